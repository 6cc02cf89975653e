"""A study's progress on standard error: a bar, the trial in flight and the best so far."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from workbench.description_text import short_pattern
from workbench.figures import figure
from workbench.records import Study, Trial
from workbench.study import JUDGED, Reporter


class RichReporter(Reporter):
    """Draws bars on a terminal; prints a line a finished trial anywhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.best: Trial | None = None

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
        if resumed:
            done = "its goal is reached" if judged >= goal else "resuming"
            self.console.print(f"Study {study.name}: {judged} of {goal} trials are done, {done}.")
        else:
            self.console.print(f"Study {study.name}: starting, {goal} trials to judge.")
        for trial in study.front_trials()[:1]:
            self.best = trial
        self.overall = self.progress.add_task("trials", total=goal, completed=judged, note="")
        self.current = self.progress.add_task("training", total=100, visible=False, note="")
        self._show_best()

    def trial_started(self, number: int, pattern: str) -> None:
        self.progress.update(
            self.current, completed=0, visible=True, description=f"trial {number}", note=pattern
        )

    def trial_progress(self, number: int, share: float, loss: float) -> None:
        self.progress.update(self.current, completed=int(100 * share), note=f"loss {loss:.3f}")

    def trial_finished(self, trial: Trial) -> None:
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
        if trial.outcome not in ("complete", "duplicate"):
            return f"trial {trial.number:>3} {trial.outcome}: {trial.reason}"
        figures = "  ".join(
            f"{o.name} {figure(trial.metrics.get(o.name), o.unit)}" for o in self.study.objectives
        )
        seconds = trial.data["seconds"]
        return (
            f"trial {trial.number:>3} {trial.outcome}  {figures}  {trial.pattern}  {seconds:.1f} s"
        )

    def _show_best(self) -> None:
        if self.best is not None:
            first = self.study.objectives[0]
            value = figure(self.best.metrics[first.name], first.unit)
            note = f"best {first.name} {value} {self.best.pattern} (trial {self.best.number})"
            self.progress.update(self.overall, note=note)
