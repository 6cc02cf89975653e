"""Judges trials in the study's own process: for debuggers and fast tests, not for long studies."""

from __future__ import annotations

from pathlib import Path

from workbench.executors.base import Executor
from workbench.layout import Layout
from workbench.trial import Emit, Verdict, Workplace, judge


class InlineExecutor(Executor):
    """No isolation: a crash ends the study, and trials cannot time out."""

    def __init__(self, place: Workplace) -> None:
        self.place = place

    def judge(self, layout: Layout, folder: Path, emit: Emit) -> Verdict:
        return judge(self.place, layout, folder, emit)

    def close(self) -> None:
        pass
