"""Where the dear stages of a trial run: a worker process, or this one."""

from __future__ import annotations

from workbench.executors.base import Executor, Job
from workbench.executors.inline import InlineExecutor
from workbench.executors.process import ProcessExecutor

__all__ = ["Executor", "InlineExecutor", "Job", "ProcessExecutor"]
