"""Judges trials in the study's own process: for debuggers and fast tests, not for long studies."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import torch

from workbench import stray_output
from workbench.errors import FieldError
from workbench.executors.base import Ended, Executor, Heard, Task
from workbench.trial import Workplace, judge
from workbench.verdict import Verdict


def open_executor(place: Workplace, cache_dir: Path) -> InlineExecutor:
    """The executor of a study.

    Raises:
        FieldError: the study asks for several workers.
    """
    if place.config.runtime.workers not in (None, 1):
        raise FieldError("runtime.workers", "executor = 'inline' judges one trial at a time")
    return InlineExecutor(place)


class InlineExecutor(Executor):
    """No isolation: a crash ends the study; `trial_timeout` and `memory_gb` have no effect.

    A task is judged while the study waits for it.
    """

    def __init__(self, place: Workplace) -> None:
        self.place = place
        self._task: Task | None = None
        if place.config.runtime.threads is not None:
            torch.set_num_threads(place.config.runtime.threads)

    @property
    def slots(self) -> int:
        return 1

    def submit(self, task: Task) -> None:
        self._task = task

    def wait(self, heard: Heard, timeout: float | None = None) -> list[Ended]:
        task, self._task = self._task, None
        if task is None:
            time.sleep(timeout or 0.0)
            return []
        number = task.number

        def told(event: dict[str, Any]) -> None:
            with contextlib.redirect_stdout(stray_output.results()):
                heard(number, event)

        with stray_output.apart():
            verdict = judge(
                self.place,
                task.layout,
                task.folder,
                told,
                begun=None if task.begun is None else Verdict(**task.begun),
                stop=task.stop,
            )
        return [(number, verdict)]

    def cancel(self) -> None:
        self._task = None

    def close(self) -> None:
        self.cancel()
