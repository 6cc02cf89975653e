"""Tables of studies and trials, from records: figures for people, in columns that fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from workbench.description_text import short_pattern
from workbench.figures import figure
from workbench.space_blocks import stored_as
from workbench.text_table import Column

if TYPE_CHECKING:
    from workbench.funnel import FunnelStage
    from workbench.records import Study, Trial

PATTERN = 24  # glyphs of a pattern shown as it is; a longer one has its repeats counted
ARROWS = {"minimize": "↓", "maximize": "↑"}


def outcome_line(study: Study) -> str:
    """How many trials ended how."""
    counts = study.summary()["outcomes"]
    parts = [f"{count} {outcome.replace('_', ' ')}" for outcome, count in counts.items()]
    return f"Study {study.name}: {', '.join(parts) if parts else 'no trials'}"


def front_line(study: Study, trials: Sequence[Trial]) -> str:
    """What the front's table shows: how many layouts, for which objectives."""
    goals = ", ".join(f"{o.name} {ARROWS[o.direction]}" for o in study.objectives)
    layouts = "1 layout" if len(trials) == 1 else f"{len(trials)} layouts"
    return f"Pareto front: {layouts} ({goals})"


def study_columns(studies: Sequence[Study]) -> list[Column]:
    """A row a study."""
    summaries = [study.summary() for study in studies]
    return [
        Column(heading="study", cells=[study.name for study in studies]),
        Column(
            heading="objectives",
            cells=[", ".join(o.name for o in study.objectives) for study in studies],
            fit="wrap",
        ),
        Column(heading="trials", cells=[f"{s['trials']:,}" for s in summaries], right=True),
        Column(
            heading="complete",
            cells=[f"{s['outcomes'].get('complete', 0):,}" for s in summaries],
            right=True,
        ),
        Column(
            heading="description", cells=[s["description"] for s in summaries], fit="wrap", rank=1
        ),
        Column(heading="folder", cells=[str(study.path) for study in studies], rank=2),
    ]


def front_columns(study: Study, trials: Sequence[Trial]) -> list[Column]:
    """A row a layout: objectives, quantizer and pattern; other metrics where there is room."""
    objectives = [objective.name for objective in study.objectives]
    others = [name for name in study.units if name not in objectives]
    return [
        _numbers(trials),
        *_metrics(study, trials, objectives, rank=0),
        *_metrics(study, trials, others, rank=len(objectives) + 1),
        Column(
            heading="quantizer",
            cells=[stored_as(trial.params) or "none" for trial in trials],
            rank=len(objectives),
        ),
        Column(
            heading="pattern",
            cells=[short_pattern(trial.pattern, PATTERN) for trial in trials],
            fit="wrap",
        ),
    ]


def trial_columns(study: Study, trials: Sequence[Trial]) -> list[Column]:
    """A row a trial, whatever its outcome: objectives, pattern, and why it ended as it did."""
    objectives = [objective.name for objective in study.objectives]
    texts = [
        ": ".join(filter(None, [short_pattern(trial.pattern, PATTERN), trial.reason]))
        for trial in trials
    ]
    return [
        _numbers(trials),
        Column(heading="outcome", cells=[trial.outcome.replace("_", " ") for trial in trials]),
        *_metrics(study, trials, objectives, rank=0),
        Column(heading="pattern, reason", cells=texts, fit="wrap"),
    ]


def funnel_columns(stages: Sequence[FunnelStage]) -> list[Column]:
    """A row a stage: trials that came, went on, and left by outcome; the time all of them took."""
    left = [
        ", ".join(f"{count} {outcome.replace('_', ' ')}" for outcome, count in stage.left.items())
        for stage in stages
    ]
    return [
        Column(heading="stage", cells=[stage.name for stage in stages]),
        Column(heading="entered", cells=[f"{stage.entered:,}" for stage in stages], right=True),
        Column(heading="passed", cells=[f"{stage.passed:,}" for stage in stages], right=True),
        Column(heading="left", cells=left, fit="wrap"),
        Column(heading="seconds", cells=[f"{stage.seconds:,.1f}" for stage in stages], right=True),
    ]


def _numbers(trials: Sequence[Trial]) -> Column:
    return Column(heading="trial", cells=[str(trial.number) for trial in trials], right=True)


def _metrics(
    study: Study, trials: Sequence[Trial], names: Sequence[str], *, rank: int
) -> Iterator[Column]:
    """A column a metric; the ranks rise from `rank`, so that the last one goes first."""
    for index, name in enumerate(names):
        unit = study.units.get(name, "")
        yield Column(
            heading=heading(name, unit),
            cells=[figure(trial.metrics.get(name), unit) for trial in trials],
            right=True,
            rank=rank + index,
        )


def heading(name: str, unit: str) -> str:
    """A metric's name with its unit, unless its figures or its name say it."""
    scaled = unit in ("bytes", "parameters", "") or unit.startswith("FLOPs")
    said = f"_{unit.replace('/', '_per_')}_" in f"_{name}_"
    return name if scaled or said else f"{name} [{unit}]"
