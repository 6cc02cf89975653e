"""`workbench scale`: a found layout at another size."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli import interrupts
from workbench.cli.common import (
    Column,
    Json,
    PluginDirs,
    Runs,
    Source,
    count,
    figure,
    print_json,
    print_table,
    say,
    warn,
)

if TYPE_CHECKING:
    from workbench.builder import Builder
    from workbench.description import Description
    from workbench.description_conditions import Conditions
    from workbench.exporter import ExportReport
    from workbench.layout import Layout
    from workbench.scaling import Scaled
    from workbench.scaling_placement import Placer

EXAMPLES = """\
  workbench scale quickstart:7 --params 1.3B --out large.json
  workbench scale quickstart:7 --params 20M --depth 12
  workbench scale quickstart:7 --params 20M --export huggingface exported/20M"""

ADVICE = "take fewer --params, or --out and train it where there is more."
PATTERN_WIDTH = 64


def scale(
    source: Source,
    params: Annotated[str, typer.Option(metavar="N", help="To reach: 1.3B, 350M, 2_000_000.")],
    depth: Annotated[
        int | None, typer.Option(metavar="N", help="Fix the layers: mixers, MLPs not counted.")
    ] = None,
    d_model: Annotated[int | None, typer.Option(metavar="N", help="Fix the width.")] = None,
    vocab: Annotated[
        int | None, typer.Option(metavar="N", help="Another vocabulary than the original's.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(metavar="TOKENS", help="At which FLOPs and state are given, as in describe."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="New JSON file for describe and train.")
    ] = None,
    export: Annotated[
        tuple[str, Path] | None,
        typer.Option(
            metavar="NAME FOLDER", help="Write it, untrained, with that exporter to a new folder."
        ),
    ] = None,
    runs: Runs = None,
    plugin_dir: PluginDirs = None,
    json: Json = False,
) -> None:
    """Scale a layout to a number of parameters.

    Depth and width grow together; shares and places of the mixers, head dims and state sizes stay.
    Parameters are counted exactly, and nothing is allocated but by --export.
    """
    from workbench.errors import FieldError
    from workbench.scaling import parse_count
    from workbench.scaling import scale as scale_layout

    target = parse_count(params)
    for name, value in (("--vocab", vocab), ("--context", context)):
        if value is not None and value < 1:
            raise FieldError(name, f"must be at least 1, got {value}")
    _refuse_existing(out, export[1] if export else None)
    found = _find(source, tuple(plugin_dir or ()), runs, context)
    start = found.layout if vocab is None else found.layout.replace(vocab_size=vocab)
    scaled = scale_layout(
        found.builder, start, found.placer, target, num_layers=depth, d_model=d_model
    )
    if not scaled.is_close:
        warn(_nearest(scaled))
    report = None if export is None else _export(found, scaled, *export)
    if out is not None:
        from workbench.files import write_json

        write_json(out, scaled.layout.to_dict())
    before, after = found.describe(found.layout, source), found.describe(scaled.layout, "")
    if json:
        print_json(_data(before, after, scaled, out, report))
    else:
        _print(found, before, after, scaled)
        _print_written(out, report)


@dataclasses.dataclass(frozen=True)
class Found:
    """What is to be scaled, and how it is described."""

    builder: Builder
    layout: Layout
    placer: Placer
    conditions: Conditions
    metadata: dict[str, Any]

    def describe(self, layout: Layout, name: str) -> Description:
        from workbench.description import describe_layout

        return describe_layout(self.builder, layout, self.conditions, name=name)


def _find(source: str, folders: tuple[Path, ...], runs: Path | None, context: int | None) -> Found:
    from workbench.api import TRIAL, find
    from workbench.description_conditions import Conditions, conditions_of
    from workbench.export import tokenizer_of, trial_builder
    from workbench.records import load_trial
    from workbench.scaling_pattern import Pattern
    from workbench.scaling_placement import Placer, trial_policy

    builder, layout, preset = find(source, folders, runs)
    layers = builder.layers
    pattern = Pattern.of(layout.blocks, lambda name: layers[name].kind == "mlp")
    metadata: dict[str, Any] = {"scaled_from": source, "scaled_from_layout": layout.hash}
    if preset is not None or Path(source).exists() or not TRIAL.fullmatch(source):
        conditions = Conditions().given(context=context)
        return Found(builder, layout, Placer(pattern), conditions, metadata)
    trial = load_trial(source, runs)
    _, study = trial_builder(trial, folders)
    policy = trial_policy(trial, study, builder, layout, pattern)
    conditions = conditions_of(study, builder).given(context=context)
    metadata["tokenizer"] = tokenizer_of(study)
    return Found(builder, layout, Placer(pattern, policy), conditions, metadata)


def _refuse_existing(*paths: Path | None) -> None:
    from workbench.files import refuse_existing

    for path in paths:
        if path is not None:
            refuse_existing(path)


def _export(found: Found, scaled: Scaled, exporter: str, folder: Path) -> ExportReport:
    from workbench.cli.memory import explained, require_memory
    from workbench.scaling_export import export_bytes, export_untrained

    _ = found.builder.exporters[exporter]  # an unknown one is said before the memory is counted
    require_memory(export_bytes(found.builder, scaled.layout), "cpu", ADVICE)
    metadata = dict(found.metadata)
    if scaled.layout.vocab_size != found.layout.vocab_size:
        metadata.pop("tokenizer", None)  # another vocabulary is another tokenizer's
    with interrupts.explained("Nothing was exported."), explained(ADVICE):
        return export_untrained(found.builder, scaled.layout, folder, exporter, metadata)


def _nearest(scaled: Scaled) -> str:
    from workbench.scaling import STEPS

    return (
        f"the nearest to {scaled.target:,} parameters is {scaled.parameters:,} "
        f"({scaled.error:+.1%}): layers are whole and widths multiples of {min(STEPS)}. Another "
        "--depth or --d-model may come nearer."
    )


def _figures(description: Description, num_layers: int) -> dict[str, str]:
    total, layout = description.total, description.layout
    at = f"at {description.context:,}"
    return {
        "d_model": f"{layout.d_model:,}",
        "layers": f"{num_layers:,}",
        "blocks": f"{len(layout.blocks):,}",
        "vocabulary": f"{layout.vocab_size:,}",
        "parameters": f"{total.parameters:,}",
        "active parameters": f"{description.active_parameters:,}",
        "weights": figure(total.weight_bytes, "bytes"),
        f"state {at}": figure(total.state_bytes, "bytes"),
        f"FLOPs/token {at}": figure(total.forward_flops, "FLOPs"),
        f"decode FLOPs {at}": figure(total.decode_flops, "FLOPs"),
    }


def _print(found: Found, before: Description, after: Description, scaled: Scaled) -> None:
    from workbench.description_text import short_pattern

    old = _figures(before, len(found.placer.pattern.kinds))
    new = _figures(after, scaled.num_layers)
    for name, description in (("original", before), ("scaled", after)):
        say(f"{name + ':':9} {short_pattern(description.pattern, PATTERN_WIDTH)}")
    print()
    print_table(
        [
            Column(heading="", cells=list(old)),
            Column(heading=before.name or "original", cells=list(old.values()), right=True),
            Column(heading="scaled", cells=list(new.values()), right=True),
        ]
    )
    say(
        f"{scaled.error:+.2%} of the target. Placement: {scaled.placement}. "
        f"State of {count(after.batch_size, 'sequence')}; {after.bytes_per_element} bytes an "
        "element where no quantizer stores it."
    )


def _print_written(out: Path | None, report: ExportReport | None) -> None:
    if out is not None:
        say(f"{out}: the layout, for workbench describe and train.")
    if report is not None:
        say(
            f"{report.path}: {count(len(report.files), 'file')}, not trained; the logits of a "
            f"fresh process differ by at most {report.max_difference:.2g}."
        )


def _data(
    before: Description,
    after: Description,
    scaled: Scaled,
    out: Path | None,
    report: ExportReport | None,
) -> dict[str, Any]:
    rows = ("blocks", "outside")
    original, result = (
        {name: value for name, value in description.to_dict().items() if name not in rows}
        for description in (before, after)
    )
    return {
        "target": scaled.target,
        "parameters": scaled.parameters,
        "error": scaled.error,
        "within_tolerance": scaled.is_close,
        "num_layers": scaled.num_layers,
        "placement": scaled.placement,
        "original": original,
        "scaled": result,
        "out": None if out is None else str(out),
        "export": None
        if report is None
        else {
            "path": str(report.path),
            "files": list(report.files),
            "max_difference": report.max_difference,
        },
    }
