"""`workbench measure`: time of a layout on this device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli.common import (
    Device,
    Json,
    PluginDirs,
    Runs,
    Source,
    count,
    print_json,
    print_table,
    say,
)
from workbench.text_table import Column

if TYPE_CHECKING:
    from workbench.builder import Builder
    from workbench.layout import Layout
    from workbench.measuring import Timing

EXAMPLES = """\
  workbench measure mamba-130m --context 512 --threads 1
  workbench measure quickstart:7 --batch-size 8 --json"""

ADVICE = "take a smaller layout, --context or --batch-size."


def measure(
    source: Source,
    context: Annotated[
        int, typer.Option(metavar="TOKENS", help="Prompt before the first decode step.")
    ] = 512,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Sequences at once.")] = 1,
    tokens: Annotated[int, typer.Option(metavar="TOKENS", help="Decode steps in a row.")] = 32,
    device: Device = "auto",
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="CPU threads; torch's choice if left out.")
    ] = None,
    runs: Runs = None,
    plugin_dir: PluginDirs = None,
    json: Json = False,
) -> None:
    """Measure prefill and decode time of a layout on this device.

    Random float32 weights, then stored as the layout's quantizers say. Medians with their spread
    (10th to 90th percentile): measure on a quiet machine.
    """
    import torch

    from workbench.api import find
    from workbench.cli.memory import explained, require_memory
    from workbench.environment import resolve_device

    _refuse_below_one(context=context, batch_size=batch_size, tokens=tokens, threads=threads)
    if threads is not None:
        torch.set_num_threads(threads)
    where = resolve_device(device)
    plugins, layout, _ = find(source, tuple(plugin_dir or ()), runs)
    require_memory(_needed(plugins, layout, context + tokens, batch_size), where, ADVICE)
    with explained(ADVICE):
        timings = _timings(plugins, layout, where, context, batch_size, tokens)
    facts = {"source": source, "pattern": plugins.pattern(layout), "layout_hash": layout.hash}
    sizes = {"context": context, "batch_size": batch_size}
    result = {**facts, **sizes, **_figures(timings, batch_size, where)}
    if json:
        print_json(result)
    else:
        _print(result, timings)


def _refuse_below_one(**sizes: int | None) -> None:
    from workbench.errors import FieldError

    for name, value in sizes.items():
        if value is not None and value < 1:
            raise FieldError(f"--{name.replace('_', '-')}", f"must be at least 1, got {value}")


def _figures(timings: dict[str, Timing], batch_size: int, device: str) -> dict[str, Any]:
    from workbench.environment import environment

    return {
        **{f"{name}_ms": 1000 * timing.median for name, timing in timings.items()},
        **{f"{name}_spread": timing.spread for name, timing in timings.items()},
        **{f"{name}_repeats": timing.repeats for name, timing in timings.items()},
        "decode_tokens_per_second": batch_size / timings["decode"].median,
        "environment": environment(device),
    }


def _needed(plugins: Builder, layout: Layout, length: int, batch_size: int) -> int:
    """Weights as built, and the states twice: decoding starts again from a copy of them."""
    costs = plugins.costs(layout, length=length, bytes_per_element=4).total
    return 4 * costs.parameters + 2 * batch_size * costs.state_bytes


def _timings(
    plugins: Builder, layout: Layout, device: str, context: int, batch_size: int, tokens: int
) -> dict[str, Timing]:
    from workbench.measuring import decode_time, prefill_time

    model = plugins.build(layout, device=device).eval()
    plugins.quantize(model)
    return {
        "prefill": prefill_time(model, batch_size, context),
        "decode": decode_time(model, batch_size, context, tokens),
    }


def _print(result: dict[str, Any], timings: dict[str, Timing]) -> None:
    facts = result["environment"]
    versions = facts["versions"]
    say(
        f"{result['source']} ({result['layout_hash']}), random weights: "
        f"{count(result['batch_size'], 'sequence')} of {result['context']:,} tokens"
    )
    say(
        f"On {facts['device_name']} ({facts['device']}, {count(facts['threads'], 'thread')}), "
        f"torch {versions['torch']}, lm-workbench {versions['lm-workbench']}"
    )
    print()
    noisy = [timing.noisy for timing in timings.values()]
    print_table(
        [
            Column(heading="phase", cells=list(timings)),
            Column(
                heading="median ms",
                cells=[f"{1000 * timing.median:.3f}" for timing in timings.values()],
                right=True,
            ),
            Column(
                heading="spread",
                cells=[f"{timing.spread:.1%}" for timing in timings.values()],
                right=True,
            ),
            Column(
                heading="repeats",
                cells=[f"{timing.repeats:,}" for timing in timings.values()],
                right=True,
            ),
            Column(heading="", cells=["noisy" if mark else "" for mark in noisy]),
        ]
    )
    say(f"{result['decode_tokens_per_second']:,.0f} tokens/s decoding")
    if any(noisy):
        say("A spread above 5 % is noise: measure again on a quieter machine.")
