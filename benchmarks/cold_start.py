"""How long a new worker takes from its start to a trained step: prints a markdown table.

    python benchmarks/cold_start.py [--device cuda] [--rounds 5] [--profile]

A worker process, as a study starts it, is given one trial of a small hybrid; the stages end with
its own messages: what it imported, its place opened (plugins, data, kernels tried), the model
built and looked at, the first step trained, and so many more that the step is captured. The first
process finds an empty folder of compiled kernels, the others what that one left. The text is
tokenized before. `--profile` then runs a trial under cProfile and prints where the time went.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import datetime
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workbench import Block, Layout, kernels
from workbench.builder import Builder, default_builder
from workbench.executors.base import Job
from workbench.identity import used_plugins
from workbench.kernel_caches import FOLDERS, SWITCHES, read_kernel_caches
from workbench.study_config import StudyConfig
from workbench.train_step import WARMUP
from workbench.trial import make_data

STAGES = ("imports", "opening", "building", "first step", "total", "captured")
STEPS = WARMUP + 2  # the first that is replayed, and one more


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a model and its batches."""

    d_model: int
    mixers: int
    batch_size: int
    seq_len: int


SIZES = {"cuda": Size(512, 12, 16, 2048), "cpu": Size(64, 4, 2, 64)}


def layout_of(size: Size, vocab_size: int) -> Layout:
    """Mamba-2, every fourth mixer attention, an MLP after each."""
    mamba2 = Block(layer="mamba2", config={"headdim": 64 if size.d_model >= 128 else 32})
    heads = max(size.d_model // 64, 2)
    attention = Block(layer="attention", config={"num_heads": heads, "num_kv_heads": heads // 2})
    blocks: list[Block] = []
    for index in range(size.mixers):
        blocks += [attention if index % 4 == 3 else mamba2, Block(layer="swiglu")]
    return Layout(d_model=size.d_model, vocab_size=vocab_size, blocks=tuple(blocks))


def study_of(size: Size, device: str) -> StudyConfig:
    """A study that trains a few steps and judges nothing but what is known before."""
    return StudyConfig.from_dict(
        {
            "name": "cold-start",
            "objectives": ["parameters"],
            "space": {
                "d_model": size.d_model,
                "num_layers": size.mixers,
                "placements": ["uniform"],
                "mixers": ["mamba2", "attention"],
                "mlps": ["swiglu"],
            },
            "data": {"source": "stdlib"},
            "training": {
                "tokens": STEPS * size.batch_size * size.seq_len,
                "batch_size": size.batch_size,
                "seq_len": size.seq_len,
                "precision": "bfloat16",
                "record_every": 1,
                "lr": 1e-3,
            },
            "budget": {"trials": 1},
            "runtime": {"device": device},
        }
    )


def plain_environment() -> dict[str, str]:
    """This process's, but that only the study says where kernels are kept."""
    ours = (*FOLDERS, *SWITCHES)
    return {name: value for name, value in os.environ.items() if name not in ours}


def worker(job: Job, layout: Layout, folder: Path) -> Iterator[tuple[float, dict[str, Any]]]:
    """Messages of a new worker that judges one trial, and the seconds since its start at each."""
    folder.mkdir(parents=True)
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "workbench.executors.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        env=plain_environment(),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        task = {"number": 0, "layout": layout.to_dict(), "folder": str(folder)}
        for request in (job.to_dict(), {**task, "begun": None, "stop": None}):
            process.stdin.write(json.dumps(request) + "\n")
        for line in process.stdout:
            message = json.loads(line)
            yield time.perf_counter() - started, message
            if "verdict" in message or "failed" in message:
                process.stdin.close()
                break


def measured(job: Job, layout: Layout, folder: Path) -> dict[str, Any]:
    """Seconds of each stage of one new process, and what it said of itself."""
    at: dict[str, float] = {}
    result: dict[str, Any] = {}
    for seconds, message in worker(job, layout, folder):
        if "failed" in message:
            sys.exit(f"no worker could be started: {message['failed']}")
        if "ready" in message:
            at["ready"] = seconds
            result["environment"] = message["environment"]
            opening = message["seconds"]["opening"]
        elif message.get("phase") == "training":
            at["training"] = seconds
        elif "progress" in message:
            at.setdefault("first", seconds)
            at["last"] = seconds
        elif "verdict" in message:
            result["verdict"] = message["verdict"]
    if result["verdict"]["outcome"] != "complete":
        sys.exit(f"{result['verdict']['outcome']}: {result['verdict']['reason']}, see {folder}")
    result["seconds"] = {
        "imports": at["ready"] - opening,  # with the interpreter's own start
        "opening": opening,
        "building": at["training"] - at["ready"],
        "first step": at["first"] - at["training"],
        "total": at["first"],
        "captured": at["last"] - at["first"],
    }
    return result


def report(cold: dict[str, Any], warm: list[dict[str, Any]], size: Size, parameters: int) -> str:
    """The table, under lines that say what, where and when."""
    facts, details = cold["environment"], warm[-1]["verdict"]["details"]
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v)
    lines = [
        f"{datetime.date.today()}, {facts['device_name']}, {facts['cores']} cores, "
        f"Python {facts['python']}, {versions}",
        f"{parameters / 1e6:.1f} M parameters, {2 * size.mixers} blocks, {size.batch_size} × "
        f"{size.seq_len:,} tokens a step; steps run as: {details['training']['mode']}"
        + (f" ({details['training']['note']})" if details["training"]["note"] else ""),
        "",
        f"| kernels | {' | '.join(STAGES[:4])} | **total** | {STEPS - 1} more steps, capture |",
        "|---|---:|---:|---:|---:|---:|---:|",
        _row("none kept", [cold]),
        _row(f"kept, median of {len(warm)}", warm),
        _row("kept, slowest", warm, max),
    ]
    return "\n".join(lines)


def _row(name: str, results: list[dict[str, Any]], pick: Any = statistics.median) -> str:
    cells = [pick([result["seconds"][stage] for result in results]) for stage in STAGES]
    return f"| {name} | {' | '.join(f'{cell:.2f} s' for cell in cells)} |"


def profiled(job: Job, layout: Layout, folder: Path) -> None:
    """One trial in this process, which has imported torch already: what took longest."""
    from workbench.executors.worker import open_place
    from workbench.trial import judge

    folder.mkdir(parents=True)
    with cProfile.Profile() as profile:
        place = open_place(job, {})
        judge(place, layout, folder, lambda event: None)
    from torch._dynamo.utils import calculate_time_spent, counters

    for order in ("cumulative", "tottime"):
        pstats.Stats(profile).sort_stats(order).print_stats(70)
    print({name: round(value, 2) for name, value in calculate_time_spent().items()})
    print({name: dict(counters[name]) for name in ("frames", "aot_autograd", "inductor")})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=tuple(SIZES), default="cuda")
    parser.add_argument("--rounds", type=int, default=5, help="processes with kernels kept")
    parser.add_argument("--cache", type=Path, help="keep data and kernels here; as found, not cold")
    parser.add_argument("--profile", action="store_true", help="then say where the time goes")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    size, builder = SIZES[options.device], default_builder(())
    config = study_of(size, options.device)
    with tempfile.TemporaryDirectory() as temporary:
        cache = (options.cache or Path(temporary) / "cache").resolve()
        data = make_data(config, builder, cache)
        plugins = used_plugins(config, builder)
        kernels.statuses()  # as a study's process tries them all before it starts a worker
        job = Job(
            config=config,
            device=options.device,
            cache_dir=cache,
            plugins=plugins,
            probed=kernels.found(),
        )
        layout = builder.resolve(layout_of(size, -(-data.vocab_size // 64) * 64))
        run(job, layout, builder, Path(temporary), options)


def run(
    job: Job, layout: Layout, builder: Builder, folder: Path, options: argparse.Namespace
) -> None:
    """Measure, print, and profile if asked to."""
    size = SIZES[options.device]
    results = []
    for index in range(options.rounds + 1):
        results.append(measured(job, layout, folder / f"trial-{index}"))
        seconds = {name: round(value, 2) for name, value in results[-1]["seconds"].items()}
        spent = results[-1]["verdict"]["details"]["preparing_seconds"]
        print(f"process {index}: {seconds}, preparing {spent}", file=sys.stderr, flush=True)
    parameters = builder.costs(layout, length=1).total.parameters
    print(report(results[0], results[1:], size, parameters))
    for kept in read_kernel_caches(job.cache_dir):
        print(f"\nKept: {kept.num_bytes / 2**20:.1f} MiB in {kept.num_files:,} files")
    if options.profile:
        for name in (*FOLDERS, *SWITCHES):
            os.environ.pop(name, None)
        profiled(job, layout, folder / "profiled")


if __name__ == "__main__":
    main()
