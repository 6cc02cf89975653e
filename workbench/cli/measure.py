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
    from workbench.measuring import Stepper
    from workbench.model import HybridLM
    from workbench.roofline import Roofline

EXAMPLES = """\
  workbench measure mamba-130m --context 512 --threads 1
  workbench measure mamba-130m --batch 1,64 --context 512,2048
  workbench measure quickstart:7 --batch 8 --json"""

ADVICE = "take a smaller layout, --context or --batch."


def measure(
    source: Source,
    context: Annotated[
        str, typer.Option(metavar="TOKENS,…", help="Lengths of the prompts.")
    ] = "512",
    batch: Annotated[
        str, typer.Option("--batch", "--batch-size", metavar="N,…", help="Sequences at once.")
    ] = "1",
    tokens: Annotated[int, typer.Option(metavar="TOKENS", help="Generated after each.")] = 32,
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="Of weights and caches: float32, bfloat16, …")
    ] = "float32",
    steps: Annotated[
        str, typer.Option(metavar="HOW", help="eager, cuda-graph, or auto: a graph on CUDA.")
    ] = "auto",
    device: Device = "auto",
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="CPU threads; torch's choice if left out.")
    ] = None,
    runs: Runs = None,
    plugin_dir: PluginDirs = None,
    json: Json = False,
) -> None:
    """Measure generation with a layout on this device.

    Random weights, stored as the layout's quantizers say; a row for each batch and context. TTFT
    is the time to the first token, TPOT the median time of each after it; bound is the least time
    that the device allows, and gap how many times it the measured time is.
    """
    import torch

    from workbench.api import find
    from workbench.cli.memory import explained, require_memory
    from workbench.environment import resolve_device
    from workbench.kernel_caches import use_kernel_caches
    from workbench.measuring import stepper_of
    from workbench.records import runs_folder

    contexts, batches = numbers(context, "--context"), numbers(batch, "--batch")
    refuse_below(tokens=(tokens, 2), threads=(threads, 1))
    refuse_dtype(dtype)
    if threads is not None:
        torch.set_num_threads(threads)
    where = resolve_device(device)
    use_kernel_caches(runs_folder(runs) / ".cache", where)
    how, stepper = stepper_of(steps, where)
    plugins, layout, _ = find(source, tuple(plugin_dir or ()), runs)
    needed = _needed(plugins, layout, max(contexts) + tokens, max(batches), dtype)
    require_memory(needed, where, ADVICE)
    with explained(ADVICE):
        roofline = _roofline(plugins, where, dtype, runs)
        model = plugins.build(layout, device=where, dtype=getattr(torch, dtype)).eval()
        plugins.quantize(model)
        points = [
            _point(model, roofline, batch_size, length, tokens, stepper)
            for length in contexts
            for batch_size in batches
        ]
    result = {
        "source": source,
        "pattern": plugins.pattern(layout),
        "layout_hash": layout.hash,
        "dtype": dtype,
        "tokens": tokens,
        "steps": how,
        "points": points,
        **_facts(roofline, where),
    }
    if json:
        print_json(result)
    else:
        _print(result)


def numbers(text: str, option: str) -> list[int]:
    """`1,64` as whole numbers, each once.

    Raises:
        FieldError: one is below 1.
        BadParameter: one is no whole number.
    """
    from workbench.errors import FieldError

    try:
        values = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no list of whole numbers, such as 1,64", param_hint=f"'{option}'"
        ) from None
    if min(values) < 1:
        raise FieldError(option, f"must be at least 1, got {min(values)}")
    return values


def refuse_below(**limits: tuple[int | None, int]) -> None:
    """Refuse options below their least value; None was not given."""
    from workbench.errors import FieldError

    for name, (value, least) in limits.items():
        if value is not None and value < least:
            option = f"--{name.replace('_', '-')}"
            raise FieldError(option, f"must be at least {least}, got {value}")


def refuse_dtype(dtype: str) -> None:
    """Refuse what is no dtype of models."""
    from workbench.costs import DTYPE_BYTES
    from workbench.errors import UnknownNameError

    if dtype not in DTYPE_BYTES:
        raise UnknownNameError("dtype", dtype, DTYPE_BYTES)


def _needed(plugins: Builder, layout: Layout, length: int, batch_size: int, dtype: str) -> int:
    """Weights as built, and the states."""
    from workbench.costs import DTYPE_BYTES

    element = DTYPE_BYTES[dtype]
    costs = plugins.costs(layout, length=length, bytes_per_element=element).total
    return element * costs.parameters + batch_size * costs.state_bytes


def _roofline(plugins: Builder, device: str, dtype: str, runs: Any) -> Roofline:
    from workbench.latency_table import latency_folder
    from workbench.records import runs_folder
    from workbench.roofline import Roofline, ceilings

    folder = latency_folder(runs_folder(runs) / ".cache")
    return Roofline(plugins, ceilings(device, dtype, folder))


def _point(
    model: HybridLM,
    roofline: Roofline,
    batch_size: int,
    context: int,
    tokens: int,
    stepper: Stepper,
) -> dict[str, Any]:
    """Measured figures, and bounds under names of their own."""
    from workbench.measuring_generation import generation_time
    from workbench.measuring_memory import inference_memory

    generation = generation_time(model, batch_size, context, tokens, stepper=stepper)
    figures: dict[str, Any] = {"batch_size": batch_size, "context": context}
    for name, phase, timing in (
        ("ttft", "prefill", generation.first_token),
        ("tpot", "decode", generation.per_token),
    ):
        bound = roofline.bound(model.layout, phase, batch_size, context)  # type: ignore[arg-type]
        figures |= {
            f"{name}_ms": 1000 * timing.median,
            f"{name}_bound_ms": 1000 * bound.seconds,
            f"{name}_gap": bound.gap(timing.median),
            f"{name}_mfu": bound.mfu(timing.median),
            f"{name}_mbu": bound.mbu(timing.median),
            f"{name}_fits_cache": bound.fits_cache,
            f"{name}_spread": timing.spread,
            f"{name}_noisy": timing.noisy,
            f"{name}_repeats": timing.repeats,
        }
    figures["tokens_per_second"] = generation.tokens_per_second
    figures["peak_bytes"] = figures["reserved_bytes"] = None  # only CUDA devices count them
    if model.device.type == "cuda":
        peaks = [inference_memory(model, "prefill", batch_size, context)]
        peaks.append(inference_memory(model, "decode", batch_size, context, stepper=stepper))
        figures["peak_bytes"] = max(peak.allocated for peak in peaks)
        figures["reserved_bytes"] = max(peak.reserved for peak in peaks)
    return figures


def _facts(roofline: Roofline, device: str) -> dict[str, Any]:
    from workbench.environment import environment

    limits = roofline.ceilings
    return {
        "ceilings": {
            "bytes_per_second": limits.bandwidth,
            "flops_per_second": limits.rate,
            "cache_bytes": limits.cache_bytes,
        },
        "environment": environment(device),
    }


def _print(result: dict[str, Any]) -> None:
    facts, limits = result["environment"], result["ceilings"]
    versions = facts["versions"]
    say(
        f"{result['source']} ({result['layout_hash']}), random {result['dtype']} weights; "
        f"{result['tokens']} tokens generated after each prompt, steps {result['steps']}"
    )
    say(
        f"On {facts['device_name']} ({facts['device']}, {count(facts['threads'], 'thread')}), "
        f"torch {versions['torch']}, lm-workbench {versions['lm-workbench']}; measured ceilings: "
        f"{limits['bytes_per_second'] / 1e9:,.4g} GB/s, "
        f"{limits['flops_per_second'] / 1e12:,.3g} TFLOP/s"
    )
    print()
    points = result["points"]
    for name, rest in (("ttft", []), ("tpot", _throughput(points))):
        print_table([*_sizes(points), *_columns(points, name), *rest])
    if any(point[f"{name}_noisy"] for point in points for name in ("ttft", "tpot")):
        say("Noisy: a spread (10th to 90th percentile) above 5 %. Measure on a quieter machine.")
    if any(point[f"{name}_mbu"] > 1 for point in points for name in ("ttft", "tpot")):
        say("MBU above 1: weights and states stay in the cache, which is faster than memory.")


def _sizes(points: list[dict[str, Any]]) -> list[Column]:
    return [
        Column(heading=name, cells=[f"{point[key]:,}" for point in points], right=True)
        for name, key in (("batch", "batch_size"), ("context", "context"))
    ]


def _columns(points: list[dict[str, Any]], name: str) -> list[Column]:
    """What was measured, what bounds it, and how the two compare: a column each."""

    def column(heading: str, key: str, form: str, rank: int = 0) -> Column:
        cells = [format(point[f"{name}_{key}"], form) for point in points]
        return Column(heading=heading, cells=cells, right=True, rank=rank)

    marks = ["noisy" if point[f"{name}_noisy"] else "" for point in points]
    return [
        column(f"{name.upper()} ms", "ms", ",.4g"),
        column("bound ms", "bound_ms", ",.3g"),
        column("gap", "gap", ",.1f"),
        column("MFU", "mfu", ".1%"),
        column("MBU", "mbu", ".1%"),
        column("spread", "spread", ".1%", rank=1),
        Column(heading="", cells=marks),
    ]


def _throughput(points: list[dict[str, Any]]) -> list[Column]:
    """Of whole generations; no column of memory where nothing counts it."""
    peaks = [point["peak_bytes"] for point in points]
    return [
        Column(
            heading="tokens/s",
            cells=[f"{point['tokens_per_second']:,.0f}" for point in points],
            right=True,
        ),
        Column(
            heading="peak GiB",
            cells=["" if peak is None else f"{peak / 2**30:.3f}" for peak in peaks],
            right=True,
        ),
    ]
