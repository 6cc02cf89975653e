"""How well single layers predict whole models: prints markdown tables, `--record` keeps the table.

    python benchmarks/latency_model.py [--device cpu] [--dtype float32] [--record TABLE.json]

Draws layouts from a space of three mixers, measures their layers, fits the sums to some whole
models and judges them by others; then times the predictions themselves. `--cpu-time` counts the
CPU seconds of this process in place of the wall's: for one thread of a busy machine.
"""

import argparse
import datetime
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from workbench.builder import Builder, default_builder
from workbench.clocks import ProcessorClock
from workbench.environment import package_versions
from workbench.latency import LatencyModel
from workbench.latency_drawing import draw_layouts
from workbench.latency_evaluation import evaluate
from workbench.latency_filling import Filler, ModelTimer
from workbench.latency_machine import PHASES, Load, Machine
from workbench.latency_table import LatencyTable
from workbench.layout import Layout
from workbench.measuring import STEPS
from workbench.roofline import Roofline, measure_ceilings
from workbench.space import Space, SpaceConfig

BLOCKS = 24  # of the layouts whose prediction is timed
TIMED = 500  # layouts


def space(builder: Builder, options: argparse.Namespace, depths: Sequence[int]) -> Space:
    """Mamba, Mamba-2 and attention in any order, each followed by a SwiGLU."""
    config = SpaceConfig(
        d_model=options.widths,
        num_layers=list(depths),
        mixers=("mamba", "mamba2", "attention"),
        placements=("free",),
        mlps=("swiglu",),
        layers={
            "mamba": {"d_state": 16},
            "mamba2": {"headdim": options.head_dim, "d_state": options.state},
            "attention": {"head_dim": options.head_dim},
        },
    )
    return Space(config, builder, options.vocabulary)


def make_table(
    options: argparse.Namespace, builder: Builder, layouts: list[Layout]
) -> LatencyTable:
    """Every part of the layouts and every whole, measured now."""
    timer = ModelTimer.of(options.steps, options.device)
    if options.cpu_time:
        timer = ModelTimer(name="cpu-time", clock=ProcessorClock)
    machine = Machine.here(options.device, options.dtype, timer.name)
    table = LatencyTable(machine, options.record)
    filler = Filler(
        table=table,
        builder=builder,
        timer=timer,
        device=options.device,
        rounds=options.rounds,
        passes=options.passes,
        progress=lambda done, total, what: print(f"{done}/{total} {what}", file=sys.stderr),
    )
    loads = [
        Load(phase=phase, batch_size=batch, length=options.context)
        for phase in PHASES
        for batch in options.batch
    ]
    for part, reason in filler.fill(layouts, loads).failed.items():
        print(f"not measured: {part}: {reason}", file=sys.stderr)
    filler.observe(layouts[: options.fit], loads, "fit")
    filler.observe(layouts[options.fit :], loads, "check")
    return table


def accuracy(table: LatencyTable, builder: Builder) -> str:
    """A table of errors, of plain and of corrected sums, on layouts that were not fitted to."""
    lines = [
        "| phase | batch | context | layouts | | MAPE | Kendall τ | worst |",
        "|---|---:|---:|---:|---|---:|---:|---:|",
    ]
    fitted = LatencyModel.fitted(table, builder)
    for name, model in (("plain sums", LatencyModel(table, builder)), ("corrected", fitted)):
        for found in evaluate(model, model.observations("check")):
            tau = "–" if found.kendall_tau is None else f"{found.kendall_tau:.3f}"
            lines.append(
                f"| {found.load.phase} | {found.load.batch_size} | {found.load.length} "
                f"| {len(found.rows)} | {name} | {found.mape:.1%} | {tau} "
                f"| {found.worst.error:+.1%} |"
            )
    lines.append("")
    for phase, correction in fitted.corrections.items():
        scales = ", ".join(f"{name} × {scale:.2f}" for name, scale in correction.scales.items())
        lines.append(
            f"{phase}: overhead {correction.overhead * 1e6:.0f} µs, {scales}; fitted to "
            f"{correction.observations} whole models"
        )
    return "\n".join(lines)


def speed(table: LatencyTable, builder: Builder, options: argparse.Namespace) -> str:
    """Predictions a second of layouts that were never seen, seconds of this process."""
    roofline = Roofline(builder, measure_ceilings(options.device, options.dtype))
    model = LatencyModel.fitted(table, builder, roofline)
    many = draw_layouts(space(builder, options, [BLOCKS // 2]), TIMED, seed=1)
    begin = time.process_time()
    for layout in many:
        model.predict(layout, "decode", options.batch[0], options.context)
    spent = time.process_time() - begin
    limits = roofline.ceilings
    return (
        f"{len(many) / spent:,.0f} predictions a second, lower bounds included, of {len(many)} "
        f"layouts of {BLOCKS} blocks\n\n"
        f"Ceilings: {limits.bandwidth / 1e9:,.4g} GB/s, {limits.rate / 1e12:,.3g} TFLOP/s "
        f"({options.dtype}), last cache {limits.cache_bytes / 2**20:,.0f} MiB"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    numbers = {"type": lambda text: [int(part) for part in text.split(",")]}
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", default="auto", choices=STEPS)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--widths", default=[64, 128], **numbers)
    parser.add_argument("--depths", default=[2, 3, 4, 6], **numbers)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--state", type=int, default=32, help="of Mamba-2")
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--batch", default=[1], **numbers)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--fit", type=int, default=16, help="whole models to fit to")
    parser.add_argument("--check", type=int, default=16, help="other whole models to judge by")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=1, help="for a machine that others use")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds, not the wall's")
    parser.add_argument("--record", type=Path, help="file to keep the table in")
    parser.add_argument("--read", type=Path, help="a recorded table, in place of measuring")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    torch.set_num_threads(1)
    builder = default_builder()
    if options.read is not None:
        table = LatencyTable.read(options.read, strict=False)
    else:
        layouts = draw_layouts(space(builder, options, options.depths), options.fit + options.check)
        table = make_table(options, builder, layouts)
    machine = table.machine
    print(
        f"Device {machine.device_name}, {machine.dtype}, timer {machine.timer}, "
        f"threads {machine.threads}, torch {machine.versions['torch']}, "
        f"lm-workbench {package_versions()['lm-workbench']}, {datetime.date.today()}\n"
    )
    print(accuracy(table, builder))
    if options.read is None:
        print(f"\n{speed(table, builder, options)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
