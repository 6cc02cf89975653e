"""Training and decoding speed on a CUDA device beside other libraries: prints a markdown table.

    python benchmarks/gpu_speed.py [--rows train-mamba2,decode-1] [--json FILE] [--profile]

The same layout, batch and optimizer for all, one process a contestant, one run; figures are
medians of the device's clock with the distance of the 10th to the 90th percentile beside them.
First calls, which compile and tune, are not in them. Peak memory is the most that tensors held in
the whole process, first calls included. With `--profile`, the kernels that took longest follow.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_peers import (
    HYBRID_ATTENTION,
    VOCABULARY,
    mamba_ssm_generation,
    mamba_ssm_model,
    training_step,
    transformers_model,
)
from torch import Tensor

from workbench import Block, Layout
from workbench.builder import Builder
from workbench.captured_generation import CapturedGeneration
from workbench.data import Batch
from workbench.decoding import set_state_dtype
from workbench.environment import environment
from workbench.measuring import time_calls
from workbench.model import HybridLM
from workbench.optimizers import make_optimizers
from workbench.train_step import StepOptions, TrainStep
from workbench.training_config import TrainingConfig

BATCH, LENGTH = 16, 2048
PROMPT, NEW = 512, 128
OURS = "workbench"
TRAINING = {
    "mamba2": (OURS, "mamba_ssm", "transformers"),
    "mamba1": (OURS, "mamba_ssm"),
    "hybrid": (OURS, "mamba_ssm"),
    "llama": (OURS, "transformers", "transformers compiled"),
}
ROWS = [f"train-{name}" for name in TRAINING] + ["decode-1", "decode-64"]


def layout(name: str) -> Layout:
    """Our layout of a row."""
    mamba2 = Block(layer="mamba2")
    attention = Block(layer="attention", config={"num_heads": 12, "num_kv_heads": 4})
    swiglu = Block(layer="swiglu", config={"intermediate_size": 2048})
    blocks = {
        "mamba2": (mamba2,) * 24,
        "mamba1": (Block(layer="mamba"),) * 24,
        "hybrid": tuple(attention if i in HYBRID_ATTENTION else mamba2 for i in range(24)),
        "llama": (attention, swiglu) * 12,
    }
    return Layout(d_model=768, vocab_size=VOCABULARY, blocks=blocks[name])


def our_model(name: str, dtype: torch.dtype = torch.float32) -> HybridLM:
    return Builder.load().build(layout(name), device="cuda", seed=0).to(dtype)


def our_training(name: str) -> tuple[HybridLM, TrainStep]:
    model = our_model(name).train()
    config = TrainingConfig(
        tokens=BATCH * LENGTH, batch_size=BATCH, seq_len=LENGTH, optimizer="adamw", lr=1e-4
    )
    options = StepOptions(half=True, grad_clip=0.0, compiled=True, captured=True)
    return model, TrainStep(model, make_optimizers(model, config), options)


def tokens(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, shape, generator=generator)


def train(name: str, contestant: str) -> dict[str, Any]:
    """Time training steps of one contestant."""
    began = time.perf_counter()
    data = tokens(BATCH, LENGTH + 1)
    inputs, targets = data[:, :-1].contiguous(), data[:, 1:].contiguous()
    if contestant == OURS:
        model, step = our_training(name)
        batch = Batch(inputs_BT=inputs, targets_BT=targets).pinned()
        with step.running():
            first = first_call(lambda: step(batch, 1e-4), began)
            result = timed_steps(lambda: step(batch, 1e-4), model, first)
            backends = model.layers[0].backends(torch.bfloat16)
            return {**result, "mode": step.mode, "backends": backends}
    model_ = mamba_ssm_model(name, torch.float32) if contestant == "mamba_ssm" else None
    model_ = model_ or transformers_model(name)
    run = training_step(model_, compiled=contestant.endswith("compiled"))
    on_device = inputs.cuda(), targets.cuda()
    first = first_call(lambda: run(*on_device), began)
    return timed_steps(lambda: run(*on_device), model_, first)


def first_call(step: Callable[[], Tensor], began: float) -> dict[str, float]:
    loss = float(step())
    return {"first_loss": loss, "first_step_s": time.perf_counter() - began}


def timed_steps(
    step: Callable[[], Tensor], model: torch.nn.Module, first: dict[str, float]
) -> dict[str, Any]:
    for _ in range(5):
        loss = step()
    timing = time_calls(step, device="cuda", warmup=2, repeats=15)
    return {
        **first,
        "loss": float(loss),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "ms": timing.median * 1000,
        "spread": timing.spread,
        "tokens_per_second": BATCH * LENGTH / timing.median,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "profile": profiled(step),
    }


def decode(batch: int, contestant: str) -> dict[str, Any]:
    """Time greedy generation, prefill included, of one contestant in bfloat16."""
    prompt = tokens(batch, PROMPT).cuda()
    parts: dict[str, Callable[[], object]] = {}
    if contestant == OURS:
        run, parts = our_generation(batch, prompt)
    else:
        model = mamba_ssm_model("hybrid", torch.bfloat16).eval()
        run = mamba_ssm_generation(model, prompt, NEW)
    with torch.inference_mode():
        timing = time_calls(run, device="cuda", warmup=2, repeats=7)
        timed = {name: time_calls(part, device="cuda", repeats=15) for name, part in parts.items()}
        return {
            "ms": timing.median * 1000,
            "spread": timing.spread,
            "tokens_per_second": batch * NEW / timing.median,
            "parts_ms": {name: part.median * 1000 for name, part in timed.items()},
            "profile": profiled(parts.get("step", run)),
            "profile_of_prefill": profiled(parts["prefill"]) if parts else [],
        }


@torch.inference_mode()
def our_generation(
    batch: int, prompt: Tensor
) -> tuple[Callable[[], object], dict[str, Callable[[], object]]]:
    """A whole generation, prefill and steps captured before, and its parts: prefill, one step.

    The recurrences' states are in the model's dtype, as the peer keeps them.
    """
    model = our_model("hybrid", torch.bfloat16).eval()
    set_state_dtype(model, torch.bfloat16)
    generate = CapturedGeneration(model, prompt, NEW)
    first = generate.prefill(prompt).clone()

    def step() -> None:
        generate.prefill.rewind()
        generate.step(first)

    return lambda: generate(prompt), {"prefill": lambda: generate.prefill(prompt), "step": step}


def profiled(step: Callable[[], object]) -> list[tuple[str, float, int]]:
    """The kernels of one step that took longest: name, ms, calls."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    return [(e.key[:80], e.self_device_time_total / 1000, e.count) for e in events[:25]]


def contestants(row: str) -> tuple[str, ...]:
    kind, name = row.split("-")
    return TRAINING[name] if kind == "train" else (OURS, "mamba_ssm")


def measured(row: str, contestant: str) -> dict[str, Any]:
    """One figure, in a process of its own."""
    command = [sys.executable, __file__, "--one", row, contestant]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"failed": done.stderr.strip().splitlines()[-1:] or ["no output"]}
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def one(row: str, contestant: str) -> None:
    kind, name = row.split("-")
    result = train(name, contestant) if kind == "train" else decode(int(name), contestant)
    print(json.dumps(result))


@dataclasses.dataclass
class Table:
    """Results by row and contestant."""

    results: dict[str, dict[str, dict[str, Any]]]

    def print_head(self) -> None:
        facts = environment("cuda")
        versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v)
        print(f"{facts['device_name']}, {datetime.date.today()}; {versions}\n")
        print("| work | contestant | ms | spread | tokens/s | to peer | peak GiB | first step s |")
        print("|---|---|---:|---:|---:|---:|---:|---:|", flush=True)

    def print_line(self, row: str, contestant: str) -> None:
        result = self.results[row][contestant]
        if "failed" in result:
            print(f"| {row} | {contestant} | {' '.join(result['failed'])} | | | | | |", flush=True)
            return
        ours = self.results[row].get(OURS, {}).get("tokens_per_second")
        rate = result["tokens_per_second"]
        ratio = f"{ours / rate:.2f} ×" if ours and contestant != OURS else ""
        mark = " (noisy)" if result["spread"] > 0.05 else ""
        peak, first = result.get("peak_gib"), result.get("first_step_s")
        print(
            f"| {row} | {contestant} | {result['ms']:.1f} | {result['spread']:.1%}{mark} "
            f"| {rate:,.0f} | {ratio} | {'' if peak is None else f'{peak:.1f}'} "
            f"| {'' if first is None else f'{first:.1f}'} |",
            flush=True,
        )

    def keep(self, path: str) -> None:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.results, file, indent=1)

    def print_profiles(self) -> None:
        for row, by_contestant in self.results.items():
            result = by_contestant.get(OURS, {})
            print(f"\n{row}, {result.get('mode', '')} {result.get('backends', '')}")
            for name, milliseconds in result.get("parts_ms", {}).items():
                print(f"{name}: {milliseconds:.3f} ms by the device's clock")
            for part in ("profile", "profile_of_prefill"):
                print(part)
                for name, milliseconds, calls in result.get(part, []):
                    print(f"{milliseconds:9.3f} ms {calls:5d} × {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated; all by default")
    parser.add_argument("--json", help="write all results to this file, too")
    parser.add_argument("--profile", action="store_true", help="print where our time goes")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one(*arguments.one)
        return
    table = Table({row: {} for row in arguments.rows.split(",")})
    table.print_head()
    for row, results in table.results.items():
        for contestant in contestants(row):
            results[contestant] = measured(row, contestant)
            table.print_line(row, contestant)
            if arguments.json:
                table.keep(arguments.json)
    if arguments.profile:
        table.print_profiles()


if __name__ == "__main__":
    main()
