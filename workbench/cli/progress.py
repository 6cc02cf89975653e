"""A study's progress on standard error: a bar, the trial in flight and the best so far."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

from workbench.cli.common import SILENCE
from workbench.cli.tables import ARROWS, PATTERN
from workbench.description_text import short_pattern
from workbench.figures import figure
from workbench.records import Objective, Study, Trial
from workbench.refusals import cause_of
from workbench.study import JUDGED, Reporter


class RichReporter(Reporter):
    """Draws bars on a terminal; prints a line a finished trial anywhere.

    Lines of suggestions that came to nothing for one and the same reason are counted, not repeated.

    Args:
        console: standard error.
        silence: seconds of a trial without a line, where no bar can be drawn.
    """

    def __init__(self, console: Console, silence: float = SILENCE) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            _Count(),
            _Elapsed(),
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
        self.rows: dict[int, _Row] = {}  # of trials in flight
        self.alike: Counter[str] = Counter()
        self.pulse = _Pulse(self, silence)

    def __enter__(self) -> Self:
        self.progress.start()
        if not self.console.is_terminal:
            self.pulse.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.pulse.stop()
        self._count_alike()
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
        self._show_best()

    def trial_started(self, number: int, pattern: str) -> None:
        self._count_alike()
        task = self.progress.add_task(f"trial {number}", total=None, note="")
        self.rows[number] = _Row(task, short_pattern(pattern, PATTERN))
        self.pulse.begin(number)
        self.trial_phase(number, "starting")  # its worker, which takes seconds

    def trial_phase(self, number: int, phase: str) -> None:
        row = self.rows[number]
        row.phase = phase
        self.pulse.say(number, phase)
        self.progress.update(row.task, note=f"{phase}  {row.pattern}")

    def trial_progress(self, number: int, step: int, steps: int, loss: float) -> None:
        row = self.rows[number]
        state = f"{row.phase}, loss {loss:.3f}"
        self.pulse.say(number, f"{row.phase}, step {step:,} of {steps:,}, loss {loss:.3f}")
        note = f"{state}  {row.pattern}"
        self.progress.update(row.task, completed=step, total=steps, note=note)

    def trial_finished(self, trial: Trial) -> None:
        self.pulse.end(trial.number)
        if trial.number in self.rows:  # others came to nothing before they started
            self.progress.remove_task(self.rows.pop(trial.number).task)
        self._print(trial)
        if trial.outcome in JUDGED:
            self.progress.advance(self.overall)
        first = self.study.objectives[0]
        if trial.outcome == "complete" and (
            self.best is None
            or first.sign * trial.metrics[first.name] < first.sign * self.best.metrics[first.name]
        ):
            self.best = trial
        self._show_best()

    def notice(self, message: str) -> None:
        self._count_alike()
        self.console.print(f"{message[:1].upper()}{message[1:]}.")

    def _print(self, trial: Trial) -> None:
        """Print a trial's line, or count it with those that came to nothing for its reason."""
        reason = _came_to_nothing(trial)
        if reason is None:
            self._count_alike()
        else:
            known = reason in self.alike
            self.alike[reason] += known
            if known:
                return
        self.console.print(self._line(trial))

    def _count_alike(self) -> None:
        """Print how many lines were left out since the last one that told something new."""
        more = [f"{count} more {reason}" for reason, count in self.alike.most_common() if count]
        if more:
            text = f"{self.alike.total()} more like it" if len(self.alike) == 1 else ", ".join(more)
            self.console.print(f"           … and {text}")
        self.alike.clear()

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
        note = ""
        if self.best is not None:
            first = self.study.objectives[0]
            pattern = short_pattern(self.best.pattern, PATTERN)
            note = f"best {_with_unit(self.best, first)} {pattern} (trial {self.best.number})"
        if self.alike:
            note = f"{self.alike.total() + len(self.alike)} in a row hold nothing new  {note}"
        self.progress.update(self.overall, note=note)


@dataclasses.dataclass
class _Row:
    """A trial in flight: its bar, its pattern, and the phase that it is in."""

    task: TaskID
    pattern: str
    phase: str = ""


class _Count(MofNCompleteColumn):
    """`step/steps`; nothing while there is nothing to count."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


class _Elapsed(TimeElapsedColumn):
    """Time since a task began, also after its bar is full: a trial is evaluated then."""

    def render(self, task: Task) -> Text:
        return Text(str(timedelta(seconds=int(task.elapsed or 0))), style="progress.elapsed")


class _Pulse:
    """Prints how far each trial is, wherever all have been silent for too long."""

    def __init__(self, reporter: RichReporter, silence: float) -> None:
        self._reporter = reporter
        self._silence = silence
        self._changed = threading.Condition()
        self._states: dict[int, str] = {}
        self._began: dict[int, float] = {}
        self._open = True
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._changed:
            self._open = False
            self._changed.notify()
        if self.running:
            self._thread.join()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def begin(self, number: int) -> None:
        """A trial starts."""
        with self._changed:
            self._states[number], self._began[number] = "", time.monotonic()
            self._changed.notify()

    def say(self, number: int, state: str) -> None:
        """Where a trial is now."""
        with self._changed:
            self._states[number] = state

    def end(self, number: int) -> None:
        """A trial is over."""
        with self._changed:
            if self._states.pop(number, None) is not None:
                del self._began[number]
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while self._open:
                if not self._states:
                    self._changed.wait()
                elif not self._changed.wait(self._silence):
                    for number, state in self._states.items():
                        seconds = time.monotonic() - self._began[number]
                        self._reporter.console.print(f"trial {number:>3}  {state}, {seconds:.0f} s")


def _came_to_nothing(trial: Trial) -> str | None:
    """Why a suggestion cost no training, in a few words; None for a trial that did."""
    if trial.outcome == "duplicate":
        return f"as trial {trial.data['duplicate_of']}"
    if trial.outcome == "infeasible" and "training" not in trial.data.get("stage_seconds", {}):
        return f"refused by {cause_of(trial)}"
    return None


def _with_unit(trial: Trial, objective: Objective) -> str:
    value = trial.metrics.get(objective.name)
    text = figure(value, objective.unit)
    return text if value is None or objective.unit == "bytes" else f"{text} {objective.unit}"
