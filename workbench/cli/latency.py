"""`workbench latency`: measure the layers of a study, so that whole layouts can be predicted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli.common import (
    Json,
    PluginDirs,
    Runs,
    builder,
    count,
    log,
    print_json,
    print_table,
    say,
)
from workbench.cli.measure import numbers, refuse_below, refuse_dtype
from workbench.text_table import Column

if TYPE_CHECKING:
    from workbench.builder import Builder
    from workbench.latency_evaluation import Evaluation
    from workbench.latency_filling import Filled, ModelTimer
    from workbench.latency_machine import Load
    from workbench.latency_table import LatencyTable
    from workbench.layout import Layout
    from workbench.space import SpaceConfig

EXAMPLES = """\
  workbench latency studies/quickstart.toml --context 128
  workbench latency study.toml --device cuda --dtype bfloat16 --batch 1,64
  workbench latency mamba-130m --threads 1"""

ADVICE = "take a smaller space, --context or --batch."
FIT, CHECK = 20, 10


def latency(
    source: Annotated[
        str, typer.Argument(metavar="STUDY.toml|LAYOUT", help="A study's file, or a layout.")
    ],
    context: Annotated[
        str, typer.Option(metavar="TOKENS,…", help="Prompts, and contexts of decode steps.")
    ] = "512",
    batch: Annotated[str, typer.Option(metavar="N,…", help="Sequences at once.")] = "1",
    fit: Annotated[
        int, typer.Option(metavar="N", help="Whole models to correct the sums with.")
    ] = FIT,
    check: Annotated[
        int, typer.Option(metavar="M", help="Other whole models to judge predictions by.")
    ] = CHECK,
    cover: Annotated[
        int, typer.Option(metavar="K", help="More layouts whose layers are measured.")
    ] = 100,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the layouts drawn.")] = 0,
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="Of weights and caches: float32, bfloat16, …")
    ] = "float32",
    steps: Annotated[
        str, typer.Option(metavar="HOW", help="eager, cuda-graph, or auto: a graph on CUDA.")
    ] = "auto",
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="The study's, else auto, if left out.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="CPU threads; the study's, else torch's.")
    ] = None,
    runs: Runs = None,
    plugin_dir: PluginDirs = None,
    json: Json = False,
) -> None:
    """Measure single layers, so that latency can be predicted.

    Draws layouts from the study's space, measures each of their layers that the table of this
    machine lacks, fits predictions to some whole models and judges them by others. The metrics
    predicted_decode_ms and predicted_prefill_ms then read the table.
    """
    import torch

    from workbench import kernels
    from workbench.cli.memory import explained
    from workbench.environment import resolve_device
    from workbench.kernel_caches import use_kernel_caches
    from workbench.records import runs_folder

    contexts, batches = numbers(context, "--context"), numbers(batch, "--batch")
    refuse_below(fit=(fit, 0), check=(check, 0), cover=(cover, 0), threads=(threads, 1))
    refuse_dtype(dtype)
    subject = _subject(source, fit + check + cover, seed, runs, plugin_dir)
    if (threads or subject.threads) is not None:
        torch.set_num_threads(threads or subject.threads)  # type: ignore[arg-type]
    where = resolve_device(device or subject.device)
    use_kernel_caches(runs_folder(runs) / ".cache", where)
    kernels.prefer(subject.backends)
    kernels.require(where)
    table, timer = _open(where, dtype, steps, runs)
    with explained(ADVICE):
        result = _work(subject, table, timer, where, _loads(batches, contexts), (fit, check))
    if json:
        print_json(_data(result))
    else:
        _print(result)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Subject:
    """What is measured, and where its study says."""

    name: str
    plugins: Builder
    layouts: list[Layout]
    device: str
    threads: int | None
    backends: dict[str, str] = dataclasses.field(default_factory=dict)


def _subject(
    source: str, wanted: int, seed: int, runs: Path | None, plugin_dir: list[Path] | None
) -> _Subject:
    from workbench.api import find

    if not source.endswith(".toml"):
        plugins, layout, _ = find(source, tuple(plugin_dir or ()), runs)
        return _Subject(name=source, plugins=plugins, layouts=[layout], device="auto", threads=None)
    from workbench.records import runs_folder
    from workbench.study_config import StudyConfig
    from workbench.trial import make_data

    config = StudyConfig.read(source)
    plugins = builder([*map(Path, config.plugin_dirs), *(plugin_dir or ())])
    data = make_data(config, plugins, runs_folder(runs) / ".cache")
    return _Subject(
        name=source,
        plugins=plugins,
        layouts=_drawn(source, config.space, plugins, data.vocab_size, wanted, seed),
        device=config.runtime.device,
        threads=config.runtime.threads,
        backends=dict(config.runtime.backends),
    )


def _drawn(
    source: str, config: SpaceConfig, plugins: Builder, vocab_size: int, wanted: int, seed: int
) -> list[Layout]:
    """Layouts of a study's space.

    Raises:
        WorkbenchError: none that was drawn can be built; says what refused them, how often.
    """
    from workbench.errors import WorkbenchError
    from workbench.latency_drawing import draw_layouts
    from workbench.refusals import Refusals
    from workbench.space import Space

    refusals = Refusals()
    space = Space(config, plugins, vocab_size)
    layouts = draw_layouts(space, max(wanted, 1), seed, refusals.add_error)
    if not layouts:
        text = f"{source}: none of {refusals.counts.total():,} layouts drawn can be built."
        causes = "\n".join(refusals.lines(config))
        raise WorkbenchError(f"{text} What refused them:\n{causes}\nChange that in the file.")
    return layouts


def _loads(batches: list[int], contexts: list[int]) -> list[Load]:
    from workbench.latency_machine import PHASES, Load

    return [
        Load(phase=phase, batch_size=batch_size, length=length)
        for phase in PHASES
        for batch_size in batches
        for length in contexts
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Result:
    """What was done, and how well the table predicts."""

    subject: _Subject
    table: LatencyTable
    filled: Filled
    before: list[Evaluation]
    after: list[Evaluation]
    fitted_to: int
    environment: dict[str, Any]


def _open(
    device: str, dtype: str, steps: str, runs: Path | None
) -> tuple[LatencyTable, ModelTimer]:
    """The table of this machine, for this way to run steps, and what fills it."""
    from workbench.latency_filling import ModelTimer
    from workbench.latency_machine import Machine
    from workbench.latency_table import LatencyTable, latency_folder
    from workbench.records import runs_folder

    timer = ModelTimer.of(steps, device)
    folder = latency_folder(runs_folder(runs) / ".cache")
    return LatencyTable.open(folder, Machine.here(device, dtype, timer.name)), timer


def _work(
    subject: _Subject,
    table: LatencyTable,
    timer: ModelTimer,
    device: str,
    loads: list[Load],
    counts: tuple[int, int],
) -> _Result:
    """Fill the table, fit to the first of the layouts and judge by the next, as `counts` says."""
    from workbench.environment import environment
    from workbench.latency import LatencyModel
    from workbench.latency_evaluation import evaluate
    from workbench.latency_filling import Filler

    plugins, layouts = subject.plugins, subject.layouts
    fit, check = counts
    if len(layouts) == 1:
        fit, check = 0, min(check, 1)  # a layout cannot judge what was fitted to it
    with log().status("") as status:
        filler = Filler(
            table=table,
            builder=plugins,
            timer=timer,
            device=device,
            progress=lambda done, total, what: status.update(f"{done}/{total} {what}"),
        )
        filled = filler.fill(layouts, loads)
        filler.observe(layouts[:fit], loads, "fit")
        filler.observe(layouts[fit : fit + check], loads, "check")
    plain, fitted = LatencyModel(table, plugins), LatencyModel.fitted(table, plugins)
    unseen = {layout.hash for layout in layouts[fit : fit + check]}
    judged = [
        seen
        for seen in fitted.observations("check")
        if seen.layout.hash in unseen and seen.load in loads
    ]
    return _Result(
        subject=subject,
        table=table,
        filled=filled,
        before=evaluate(plain, judged),
        after=evaluate(fitted, judged),
        fitted_to=max((c.observations for c in fitted.corrections.values()), default=0),
        environment=environment(device),
    )


def _data(result: _Result) -> dict[str, Any]:
    """JSON: predicted and measured under names of their own."""
    return {
        "source": result.subject.name,
        "table": str(result.table.path),
        "machine": result.table.machine.to_dict(),
        "entries": len(result.table.entries),
        "measured": result.filled.measured,
        "failed": result.filled.failed,
        "fitted_to": result.fitted_to,
        "uncorrected": [_evaluation(evaluation) for evaluation in result.before],
        "corrected": [_evaluation(evaluation) for evaluation in result.after],
        "environment": result.environment,
    }


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    return {
        **dataclasses.asdict(evaluation.load),
        "layouts": len(evaluation.rows),
        "unknown": evaluation.unknown,
        "mape": evaluation.mape,
        "kendall_tau": evaluation.kendall_tau,
        "worst_error": evaluation.worst.error,
        "worst_layout": evaluation.worst.layout_hash,
        "rows": [
            {
                "layout_hash": row.layout_hash,
                "pattern": row.pattern,
                "predicted_ms": 1000 * row.predicted,
                "measured_ms": 1000 * row.measured,
            }
            for row in evaluation.rows
        ],
    }


def _print(result: _Result) -> None:
    table, facts = result.table, result.environment
    say(
        f"{result.subject.name}: {count(len(result.subject.layouts), 'layout')}; "
        f"{count(result.filled.measured, 'figure')} measured, {len(table.entries):,} in the table"
    )
    say(
        f"On {facts['device_name']} ({facts['device']}, {count(facts['threads'], 'thread')}), "
        f"{table.machine.dtype}, steps {table.machine.timer}, torch {facts['versions']['torch']}; "
        f"table: {table.path}"
    )
    for part, reason in result.filled.failed.items():
        say(f"Not measured: {part}: {reason}")
    if not result.after:
        say("Nothing to judge predictions by: raise --check.")
        return
    say(f"Predictions, corrected by {count(result.fitted_to, 'whole model')}, of others:")
    print()
    print_table(_columns(result.before, result.after))


def _columns(before: list[Evaluation], after: list[Evaluation]) -> list[Column]:
    """A row a load: errors of the plain sums, and of the corrected ones."""
    plain = {evaluation.load: evaluation for evaluation in before}

    def column(heading: str, cells: list[str], rank: int = 0) -> Column:
        return Column(heading=heading, cells=cells, right=True, rank=rank)

    taus = ["–" if e.kendall_tau is None else f"{e.kendall_tau:.3f}" for e in after]
    return [
        Column(heading="phase", cells=[e.load.phase for e in after]),
        column("batch", [f"{e.load.batch_size:,}" for e in after]),
        column("context", [f"{e.load.length:,}" for e in after]),
        column("layouts", [f"{len(e.rows):,}" for e in after]),
        column("MAPE of sums", [f"{plain[e.load].mape:.1%}" for e in after], rank=1),
        column("MAPE", [f"{e.mape:.1%}" for e in after]),
        column("Kendall τ", taus),
        column("worst", [f"{e.worst.error:+.1%}" for e in after]),
    ]
