"""What the CPU scans cost beside attention: prints a markdown table, `--check` holds the targets.

    python benchmarks/cpu_scans.py [--rounds 15] [--check]

Forward and backward at B=8, L=256, fp32, one thread. The contestants take turns, so that whatever
else the machine does hits them alike; the ratio is the median over rounds of the ratio within one.
"""

import argparse
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from workbench_mamba.scan import causal_conv1d, selective_scan, ssd

BATCH, LENGTH = 8, 256
TARGETS = {"selective_scan, D=256, N=16": 3.5, "ssd, 4 heads × 64, N=64, G=1": 1.3}
BASELINE = "SDPA causal, 4 heads × 64"
WARM_UP_ROUNDS = 2


def forward_and_backward(run: Callable[..., Tensor], *arguments: Tensor) -> Callable[[], None]:
    """A function that runs forward and backward once, with a fixed gradient of the output."""
    leaves = [argument.requires_grad_() for argument in arguments]
    gradient = torch.randn_like(run(*leaves))

    def once() -> None:
        torch.autograd.grad(run(*leaves), leaves, gradient)

    return once


def contestants() -> dict[str, Callable[[], None]]:
    """The timed calls by name, the baseline first."""
    torch.manual_seed(0)
    heads, headdim, channels, n_state = 4, 64, 256, 16
    tokens = (BATCH, LENGTH)
    qkv = [torch.randn(BATCH, heads, LENGTH, headdim) for _ in range(3)]
    mamba = (
        torch.randn(*tokens, channels),
        torch.rand(*tokens, channels) * 0.1,
        -torch.rand(channels, n_state) * 16,
        torch.randn(*tokens, n_state),
        torch.randn(*tokens, n_state),
        torch.randn(channels),
    )
    mamba2 = (
        torch.randn(*tokens, heads, headdim),
        torch.rand(*tokens, heads) * 0.1,
        -torch.rand(heads) * 16,
        torch.randn(*tokens, 1, 64),
        torch.randn(*tokens, 1, 64),
        torch.randn(heads),
    )
    filters = (torch.randn(*tokens, channels), torch.randn(channels, 4), torch.randn(channels))
    first, second = TARGETS
    return {
        BASELINE: forward_and_backward(
            lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True), *qkv
        ),
        first: forward_and_backward(lambda *a: selective_scan(*a)[0], *mamba),
        second: forward_and_backward(lambda *a: ssd(*a)[0], *mamba2),
        "causal_conv1d, C=256, W=4, silu": forward_and_backward(
            lambda *a: causal_conv1d(*a)[0], *filters
        ),
    }


def measure(rounds: int) -> dict[str, list[float]]:
    """Milliseconds by contestant and round, taken in turns."""
    timed = contestants()
    times: dict[str, list[float]] = {name: [] for name in timed}
    for round_number in range(WARM_UP_ROUNDS + rounds):
        for name, once in timed.items():
            begin = time.perf_counter()
            once()
            if round_number >= WARM_UP_ROUNDS:
                times[name].append((time.perf_counter() - begin) * 1e3)
    return times


def cpu_model() -> str:
    """The processor's name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds, at least 7")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    times = measure(max(7, options.rounds))
    print(
        f"Device cpu ({cpu_model()}), torch {torch.__version__}, {datetime.date.today()}, "
        f"threads=1, B={BATCH}, L={LENGTH}, fp32, forward + backward, "
        f"median of {len(times[BASELINE])} interleaved rounds\n"
    )
    print("| | ms | × SDPA | target |\n|---|---|---|---|")
    missed = False
    for name, values in times.items():
        ratio = statistics.median(
            value / baseline for value, baseline in zip(values, times[BASELINE], strict=True)
        )
        target = TARGETS.get(name)
        missed |= target is not None and ratio > target
        goal = "" if target is None else f"≤ {target}"
        print(f"| {name} | {statistics.median(values):.1f} | {ratio:.2f} | {goal} |")
    return int(missed and options.check)


if __name__ == "__main__":
    sys.exit(main())
