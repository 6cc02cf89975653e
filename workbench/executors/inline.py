"""Judges trials in the study's own process: for debuggers and fast tests, not for long studies."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from workbench import stray_output
from workbench.executors.base import Executor
from workbench.layout import Layout
from workbench.trial import Emit, Workplace, judge
from workbench.verdict import Verdict


class InlineExecutor(Executor):
    """No isolation: a crash ends the study; `trial_timeout` and `memory_gb` have no effect."""

    def __init__(self, place: Workplace) -> None:
        self.place = place
        if place.config.runtime.threads is not None:
            torch.set_num_threads(place.config.runtime.threads)

    def judge(self, layout: Layout, folder: Path, emit: Emit) -> Verdict:
        def told(event: dict[str, Any]) -> None:
            with contextlib.redirect_stdout(stray_output.results()):
                emit(event)

        with stray_output.apart():
            return judge(self.place, layout, folder, told)

    def close(self) -> None:
        pass
