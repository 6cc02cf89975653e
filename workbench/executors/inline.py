"""Judges trials in the study's own process: for debuggers and fast tests, not for long studies."""

from __future__ import annotations

from pathlib import Path

import torch

from workbench.executors.base import Executor
from workbench.layout import Layout
from workbench.trial import Emit, Verdict, Workplace, judge


class InlineExecutor(Executor):
    """No isolation: a crash ends the study; `trial_timeout` and `memory_gb` have no effect."""

    def __init__(self, place: Workplace) -> None:
        self.place = place
        if place.config.runtime.threads is not None:
            torch.set_num_threads(place.config.runtime.threads)

    def judge(self, layout: Layout, folder: Path, emit: Emit) -> Verdict:
        return judge(self.place, layout, folder, emit)

    def close(self) -> None:
        pass
