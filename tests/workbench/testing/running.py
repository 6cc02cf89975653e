"""Runs a contract suite without pytest, to see which of its tests a faulty thing fails.

And sees whether a process that was run is gone.
"""

from __future__ import annotations

import inspect
import time
from pathlib import Path
from typing import Any

import pytest

from workbench.testing.configs import ConfigContract

PARAMETERS = {"padding": 4}


def suite_tests(suite: type[ConfigContract]) -> set[str]:
    """The names of its tests."""
    return {name for name in dir(suite) if name.startswith("test_")}


def failure(base: type[ConfigContract], test: str, folder: Path, **attributes: Any) -> str:
    """How one test of a suite fails on the first config that it fails on; "" if on none.

    Skips go through: a fault must not hide behind one.

    Args:
        attributes: of the subclass of `base` that an author would write.
    """
    suite = type("Suite", (base,), attributes)
    wanted = inspect.signature(getattr(suite, test)).parameters
    for number, config in enumerate(suite.configs if "config" in wanted else [None]):
        tmp_path = folder / str(number)
        tmp_path.mkdir(parents=True)
        known = {**PARAMETERS, "config": config, "tmp_path": tmp_path}
        arguments = {name: known[name] for name in wanted if name != "self"}
        try:
            getattr(suite(), test)(**arguments)
        except (Exception, pytest.fail.Exception) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def gone(pid: int) -> bool:
    """Whether a process has ended, soon; a zombie has."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False
