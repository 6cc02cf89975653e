"""A study's progress on standard error: a bar, the trial in flight and the best so far."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from workbench.cli.tables import ARROWS, PATTERN
from workbench.description_text import short_pattern
from workbench.figures import figure
from workbench.records import Objective, Study, Trial
from workbench.study import JUDGED, Reporter


class RichReporter(Reporter):
    """Draws bars on a terminal; prints a line a finished trial anywhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn(
                "{task.fields[note]}",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis"),
            ),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.best: Trial | None = None
        self.pattern = ""

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def started(self, study: Study, resumed: bool, judged: int, goal: int) -> None:
        self.study = study
        if judged >= goal:
            state = f"its goal of {goal} trials is reached; --trials sets a higher one"
        elif resumed:
            state = f"resuming, {judged} of {goal} trials are done"
        else:
            state = f"starting, {goal} trials to judge"
        self.console.print(f"Study {study.name}: {state}.")
        goals = ", ".join(f"{o.name} {ARROWS[o.direction]}" for o in study.objectives)
        self.console.print(f"Objectives: {goals}")
        for trial in study.front_trials()[:1]:
            self.best = trial
        self.overall = self.progress.add_task("trials", total=goal, completed=judged, note="")
        self.current = self.progress.add_task("training", total=100, visible=False, note="")
        self._show_best()

    def trial_started(self, number: int, pattern: str) -> None:
        self.pattern = short_pattern(pattern, PATTERN)
        self.progress.reset(
            self.current,
            completed=0,
            visible=True,
            description=f"trial {number}",
            note=self.pattern,
        )

    def trial_progress(self, number: int, share: float, loss: float) -> None:
        state = f"loss {loss:.3f}" if share < 1 else "judging"
        note = f"{state}  {self.pattern}"
        self.progress.update(self.current, completed=int(100 * share), note=note)

    def trial_finished(self, trial: Trial) -> None:
        self.progress.update(self.current, visible=False)
        self.console.print(self._line(trial))
        if trial.outcome in JUDGED:
            self.progress.advance(self.overall)
        first = self.study.objectives[0]
        if trial.outcome == "complete" and (
            self.best is None
            or first.sign * trial.metrics[first.name] < first.sign * self.best.metrics[first.name]
        ):
            self.best = trial
        self._show_best()

    def _line(self, trial: Trial) -> str:
        start = f"trial {trial.number:>3}  {trial.outcome.replace('_', ' '):<10}"
        if trial.outcome not in ("complete", "duplicate"):
            return f"{start}  {trial.reason}"
        figures = "  ".join(_with_unit(trial, objective) for objective in self.study.objectives)
        pattern = short_pattern(trial.pattern, PATTERN)
        if trial.outcome == "duplicate":
            return f"{start}  {figures}  {pattern}  as trial {trial.data['duplicate_of']}"
        return f"{start}  {figures}  {pattern}  {trial.data['seconds']:.1f} s"

    def _show_best(self) -> None:
        if self.best is not None:
            first = self.study.objectives[0]
            pattern = short_pattern(self.best.pattern, PATTERN)
            note = f"best {_with_unit(self.best, first)} {pattern} (trial {self.best.number})"
            self.progress.update(self.overall, note=note)


def _with_unit(trial: Trial, objective: Objective) -> str:
    value = trial.metrics.get(objective.name)
    text = figure(value, objective.unit)
    return text if value is None or objective.unit == "bytes" else f"{text} {objective.unit}"
