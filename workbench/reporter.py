"""What a study says while it runs."""

from __future__ import annotations

from typing import Any

from workbench.records import Study, Trial


class Reporter:
    """Hears of a study while it runs; the command line draws it. Override what you need."""

    def started(self, study: Study, resumed: bool, judged: int, goal: int) -> None:
        """The study is open; `judged` of `goal` trials are done already."""

    def trial_started(self, number: int, pattern: str) -> None:
        """A trial passed the static stage and goes to the executor."""

    def trial_phase(self, number: int, phase: str) -> None:
        """A trial goes on to `phase`, one of `workbench.trial.PHASES`; one may come again."""

    def trial_progress(self, number: int, step: int, steps: int, loss: float) -> None:
        """Training has done `step` of `steps`, at a loss in nats a token."""

    def trial_rung(self, number: int, rung: dict[str, Any]) -> None:
        """A trial reached a rung: its figures and what was decided, as its record has them."""

    def trial_finished(self, trial: Trial) -> None:
        """A trial's record is complete, whatever its outcome."""

    def notice(self, message: str) -> None:
        """Something about the study as a whole, such as that its storage is away."""
