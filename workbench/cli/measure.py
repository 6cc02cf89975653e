"""`workbench measure`: time and memory of a layout on this device."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from workbench.cli.common import Device, Json, PluginDirs, Runs, console, print_json, table

EXAMPLE = "Example: workbench measure mamba-130m --context 512 --batch-size 1"


def measure(
    source: Annotated[str, typer.Argument(help="JSON file, STUDY:TRIAL or preset.")],
    context: Annotated[int, typer.Option(help="Prompt tokens before decoding.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    tokens: Annotated[int, typer.Option(help="Decode steps to time.")] = 32,
    device: Device = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    runs: Runs = None,
    plugin_dir: PluginDirs = None,
    json: Json = False,
) -> None:
    """Measure prefill and decode of a layout with random weights, quantized as it says."""
    import torch

    from workbench.api import load_layout
    from workbench.cli.common import builder
    from workbench.environment import environment, resolve_device
    from workbench.errors import FieldError
    from workbench.measuring import decode_time, prefill_time

    for name, value in (("context", context), ("batch-size", batch_size), ("tokens", tokens)):
        if value < 1:
            raise FieldError(f"--{name}", f"must be at least 1, got {value}")
    if threads is not None:
        torch.set_num_threads(threads)
    where = resolve_device(device)
    plugins = builder(plugin_dir)
    layout = load_layout(source, runs=runs, plugin_dirs=tuple(plugin_dir or ()))
    model = plugins.build(layout, device=where).eval()
    plugins.quantize(model)
    timings = {
        "prefill": prefill_time(model, batch_size, context),
        "decode": decode_time(model, batch_size, context, tokens),
    }
    result: dict[str, Any] = {
        "pattern": plugins.pattern(layout),
        "layout_hash": layout.hash,
        "context": context,
        "batch_size": batch_size,
        **{f"{name}_ms": 1000 * timing.median for name, timing in timings.items()},
        **{f"{name}_spread": timing.spread for name, timing in timings.items()},
        "decode_tokens_per_second": batch_size / timings["decode"].median,
        "environment": environment(where),
    }
    if json:
        print_json(result)
        return
    out = console()
    facts = result["environment"]
    out.print(
        f"{source}: {batch_size} × {context} tokens on {facts['device_name']} ({where}, "
        f"{facts['threads']} threads), torch {facts['versions']['torch']}, random weights"
    )
    rows = [
        [name, f"{1000 * timing.median:.3f}", f"{timing.spread:.1%}", _mark(timing.noisy)]
        for name, timing in timings.items()
    ]
    out.print(table(None, ["phase", "median ms", "spread", ""], rows))
    out.print(f"{result['decode_tokens_per_second']:,.0f} tokens/s decoding")


def _mark(noisy: bool) -> str:
    return "noisy: repeat on a quiet machine" if noisy else ""
