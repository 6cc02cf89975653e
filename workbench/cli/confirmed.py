"""What people see of confirmed trials: means with intervals, and who cannot be ranked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from workbench.cli.tables import front_columns, heading
from workbench.text_table import Column

if TYPE_CHECKING:
    from workbench.intervals import ConfirmedTrial
    from workbench.records import Study, Trial


def confirmed_columns(
    study: Study, trials: Sequence[Trial], confirmed: Sequence[ConfirmedTrial]
) -> list[Column]:
    """`front_columns`; on confirmed points `mean ± half`, and with whom they are unresolved."""
    columns = front_columns(study, trials)
    if not confirmed:
        return columns
    known = {one.number: one for one in confirmed}
    points = [known.get(trial.number) for trial in trials]
    names = {heading(o.name, study.units.get(o.name, "")): o.name for o in study.objectives}
    objectives = [
        _replaced(column, names[column.heading], study, points)
        if column.heading in names
        else column
        for column in columns
    ]
    seeds = ["" if point is None else str(1 + len(point.seeds)) for point in points]
    unresolved = ["" if point is None else point.unresolved_text for point in points]
    return [
        *objectives,
        Column(heading="seeds", cells=seeds, right=True),
        Column(heading="unresolved with", cells=unresolved),
    ]


def _replaced(
    column: Column, name: str, study: Study, points: Sequence[ConfirmedTrial | None]
) -> Column:
    unit = study.units.get(name, "")
    cells = [
        point.intervals[name].text(unit) if point is not None and name in point.intervals else cell
        for point, cell in zip(points, column.cells, strict=True)
    ]
    return dataclasses.replace(column, cells=cells)


def confirmed_lines(trials: Sequence[Trial], confirmed: Sequence[ConfirmedTrial]) -> list[str]:
    """What the table's figures are, and which trainings with other seeds ended badly."""
    numbers = {trial.number for trial in trials}
    shown = [one for one in confirmed if one.number in numbers]
    if not shown:
        return []
    lines = [
        "±: 95 % t interval of the mean over seeds. Points whose intervals overlap are unresolved: "
        "their order there means nothing."
    ]
    for one in shown:
        for seed, outcome in one.failed.items():
            words = outcome.replace("_", " ")
            lines.append(f"Trial {one.number} with seed {seed}: {words}; not in its mean.")
    return lines
