"""Training one layout on several GPUs beside one: prints a markdown table.

    python benchmarks/sharded_training.py [--params 1.3B] [--processes 2] [--precision bfloat16]
    python benchmarks/sharded_training.py --toy        # on the CPU, in seconds: does it work?

A preset is scaled to the wanted size and trained for some steps on made-up tokens, each row in
processes of its own: in one, in one without CUDA graphs (which several processes do not have), and
in several started by a launcher, with the same batch (the same work, shared) and with as
many sequences for each as one had. Tokens a second are of the median step after the first ones;
peak memory is the most that tensors held on a GPU, initial weights included (on a CPU, the
process's resident set). `to one` compares tokens a second with the first row; `loss` says how far
the curve is from the first row's at most: equal batches should differ by rounding alone.
"""

from __future__ import annotations

import argparse
import datetime
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from workbench.builder import default_builder
from workbench.data import Batch, DataSource
from workbench.environment import environment
from workbench.files import read_json, write_json
from workbench.layout import Layout
from workbench.sharded_launch import Alone, leave, started
from workbench.training_config import TrainingConfig

SKIPPED = 8  # first steps, which compile, tune and capture
TOY = {
    "params": "500K",
    "vocab": 256,
    "batch": 4,
    "length": 64,
    "precision": "float32",
    "steps": 12,
}


LAUNCHERS = {
    "accelerate": [
        *(sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes"),
    ],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"],
}


class Counting(DataSource):
    """Numbers that count upwards from a random one: made in no time, and learnable."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(None, seed=0, cache_dir=Path())
        self._vocab_size = vocab_size

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def train_batch(self, step: int, batch_size: int, length: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        start = torch.randint(self.vocab_size, (batch_size, 1), generator=generator)
        tokens = (start + torch.arange(length + 1)) % self.vocab_size
        return Batch(inputs_BT=tokens[:, :-1].contiguous(), targets_BT=tokens[:, 1:].contiguous())

    def validation_batches(self, batch_size: int, length: int) -> Iterator[Batch]:
        yield self.train_batch(-1, batch_size, length)

    def describe(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size}


def one(options: argparse.Namespace) -> None:
    """Measure a row in this process, and in those beside it; the first writes what was found."""
    layout = Layout.from_dict(read_json(options.layout))
    with started() as team:
        device = team.device("cpu" if options.toy else "cuda")
        config = TrainingConfig(
            tokens=options.steps * options.batch * options.length,
            batch_size=options.batch,
            seq_len=options.length,
            optimizer=options.optimizer,
            precision=options.precision,
            cuda_graph="off" if options.no_cuda_graph else "auto",
            lr=1e-3,
        )
        team.check(config)
        model = team.build(default_builder(), layout, device=device, seed=0)
        result = team.train(model, Counting(layout.vocab_size), config)
        peaks = peak_bytes(device, team)
        seconds = [point["seconds"] for point in result.curve]
        steps = [b - a for a, b in zip(seconds[SKIPPED:], seconds[SKIPPED + 1 :], strict=False)]
        found = {
            "processes": team.count,
            "batch": options.batch,
            "mode": result.mode,
            "tokens_per_second": options.batch * options.length / statistics.median(steps),
            "peaks": peaks,
            "losses": [point["loss"] for point in result.curve],
            "environment": environment(device),
        }
        team.first(lambda: write_json(options.one, found))


def peak_bytes(device: str, team: Alone) -> list[int]:
    """The most bytes that each process held."""
    if device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if team.count == 1:
        return [peak]
    peaks = torch.zeros(team.count, dtype=torch.int64)
    peaks[dist.get_rank()] = peak
    dist.all_reduce(peaks)
    return [int(each) for each in peaks]


def rows(options: argparse.Namespace) -> dict[str, tuple[int, int, list[str]]]:
    """Each row's processes, batch and options by its name, the reference first."""
    count, batch = options.processes, options.batch
    return {
        "one": (1, batch, []),
        "one, no CUDA graph": (1, batch, ["--no-cuda-graph"]),
        f"{count}, the same batch": (count, batch, []),
        f"{count}, the same batch each": (count, batch * count, []),
    }


def measured(
    options: argparse.Namespace, layout: Path, count: int, batch: int, more: list[str]
) -> dict[str, Any]:
    """A row in processes of its own."""
    result = layout.with_name("row.json")
    result.unlink(missing_ok=True)
    start = [sys.executable]
    if count > 1:
        start = [*LAUNCHERS[options.launcher], str(count)]
    names = ("length", "steps", "optimizer", "precision", "processes")
    given = [f"--{name}={getattr(options, name)}" for name in names]
    toy = ["--toy"] if options.toy else []
    command = [*start, __file__, *given, *toy, *more, f"--batch={batch}"]
    command += [f"--one={result}", f"--layout={layout}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not result.exists():
        lines = [line for line in done.stderr.splitlines() if "Error" in line]
        return {"failed": (lines or ["no result"])[0]}
    found: dict[str, Any] = read_json(result)
    return found


def scaled(options: argparse.Namespace, path: Path) -> Path:
    """The layout to train, written to `path`."""
    command = [sys.executable, "-m", "workbench", "scale", options.source]
    command += ["--params", options.params, "--vocab", str(options.vocab), "--out", str(path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


def report(options: argparse.Namespace, results: dict[str, dict[str, Any]]) -> str:
    """The markdown table, under a line that says where and when."""
    facts = next(result["environment"] for result in results.values() if "failed" not in result)
    versions = ", ".join(f"{name} {v}" for name, v in facts["versions"].items() if v)
    lines = [
        f"{facts['device_name']}, {datetime.date.today()}; {versions}. {options.source} scaled to "
        f"{options.params}, {options.precision}, {options.optimizer}, sequences of "
        f"{options.length:,} tokens, {options.steps} steps",
        "",
        "| processes | batch | mode | tokens/s | to one | peak GiB each | loss |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    first = results["one"]
    for name, result in results.items():
        if "failed" in result:
            lines.append(f"| {name} | {result['failed']} | | | | | |")
            continue
        rate = result["tokens_per_second"]
        ratio, apart = "", ""
        if "failed" not in first:
            ratio = f"{rate / first['tokens_per_second']:.2f} ×"
            if result["batch"] == first["batch"]:
                pairs = zip(result["losses"], first["losses"], strict=True)
                apart = f"{max(abs(a - b) for a, b in pairs):.1e}"
        peaks = ", ".join(f"{peak / 2**30:.2f}" for peak in result["peaks"])
        lines.append(
            f"| {name} | {result['batch']} | {result['mode']} | {rate:,.0f} | {ratio} "
            f"| {peaks} | {apart} |"
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--source", default="samba-421m", help="preset that is scaled")
    parser.add_argument("--params", default="1.3B")
    parser.add_argument("--vocab", type=int, default=50280)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step in one process")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--optimizer", default="muon")
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="accelerate")
    parser.add_argument("--json", type=Path, help="write all figures to this file, too")
    parser.add_argument("--toy", action="store_true", help="a tiny model on the CPU")
    for name in ("--one", "--layout"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--no-cuda-graph", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.toy and options.one is None:
        vars(options).update(TOY)
    return options


def main() -> int:
    options = arguments()
    if options.one is not None:
        one(options)
        leave(0)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        layout = scaled(options, Path(folder) / "layout.json")
        for name, (count, batch, more) in rows(options).items():
            results[name] = measured(options, layout, count, batch, more)
            print(f"{name}: done", file=sys.stderr, flush=True)
    if options.json is not None:
        write_json(options.json, results)
    failed = [name for name, result in results.items() if "failed" in result]
    if len(failed) == len(results):
        print(results["one"]["failed"], file=sys.stderr)
        return 1
    print(report(options, results))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
