"""Where the dear stages of a trial run: worker processes, this one, or a Ray cluster."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.executors.base import Ended, Executor, Heard, Job, Task
from workbench.study_config import EXECUTORS

if TYPE_CHECKING:
    from workbench.trial import Workplace

__all__ = ["Ended", "Executor", "Heard", "Job", "Task", "open_executor"]


def open_executor(place: Workplace, cache_dir: Path) -> Executor:
    """The executor that a study's `[runtime]` names; only its module is imported.

    Args:
        cache_dir: of all studies in the runs folder.

    Raises:
        WorkbenchError: it cannot judge anything here; says what to do.
    """
    module = import_module(EXECUTORS[place.config.runtime.executor])
    executor: Executor = module.open_executor(place, cache_dir)
    return executor
