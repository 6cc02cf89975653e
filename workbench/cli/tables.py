"""Tables of studies and trials, from records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from workbench.cli.common import figure, table

if TYPE_CHECKING:
    from rich.table import Table

    from workbench.records import Study, Trial


def outcome_line(study: Study) -> str:
    """How many trials ended how."""
    counts = study.summary()["outcomes"]
    parts = [f"{count} {outcome.replace('_', ' ')}" for outcome, count in counts.items()]
    return f"Study {study.name}: {', '.join(parts) if parts else 'no trials'}"


def front_table(study: Study, trials: Sequence[Trial]) -> Table:
    """The Pareto front: objectives first, then the other metrics, then the layout's pattern."""
    names = [objective.name for objective in study.objectives]
    names += [name for name in study.units if name not in names]
    columns = ["trial", *(_heading(study, name) for name in names), "quantizer", "pattern"]
    rows = [
        [
            trial.number,
            *(figure(trial.metrics.get(name), study.units[name]) for name in names),
            trial.params.get("quantizer", "none"),
            trial.pattern,
        ]
        for trial in trials
    ]
    arrows = {"minimize": "↓", "maximize": "↑"}
    goals = ", ".join(f"{o.name} {arrows[o.direction]}" for o in study.objectives)
    return table(f"Pareto front: {len(rows)} layouts ({goals})", columns, rows)


def trial_table(study: Study, trials: Sequence[Trial]) -> Table:
    """Every trial, its outcome and its objectives."""
    names = [objective.name for objective in study.objectives]
    columns = ["trial", "outcome", *(_heading(study, name) for name in names), "pattern", "reason"]
    rows = [
        [
            trial.number,
            trial.outcome,
            *(figure(trial.metrics.get(name), study.units[name]) for name in names),
            trial.pattern,
            trial.reason,
        ]
        for trial in trials
    ]
    return table(None, columns, rows)


def _heading(study: Study, name: str) -> str:
    unit = study.units.get(name, "")
    scaled_in_cells = unit in ("bytes", "parameters", "FLOPs", "")
    return name if scaled_in_cells or name.endswith(f"_{unit}") else f"{name} [{unit}]"
