"""Runs a contract suite without pytest, to see which of its tests a faulty thing fails."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from workbench.testing.configs import ConfigContract

PARAMETERS = {"padding": 4}


def failing_tests(suite: type[ConfigContract], folder: Path, only: str = "") -> dict[str, str]:
    """The tests of `suite` (or one of them) that fail on any of its configs, and with what.

    Skips are `BaseException`s of pytest and go through: a fault must not hide behind one.
    """
    failed = {}
    for number, name in enumerate(dir(suite)):
        if name.startswith(only or "test_"):
            wanted = inspect.signature(getattr(suite, name)).parameters
            for config in suite.configs if "config" in wanted else [None]:
                tmp_path = folder / f"{number}-{id(config)}"
                tmp_path.mkdir()
                known = {**PARAMETERS, "config": config, "tmp_path": tmp_path}
                arguments = {key: known[key] for key in wanted if key != "self"}
                try:
                    getattr(suite(), name)(**arguments)
                except Exception as error:
                    failed[name] = f"{type(error).__name__}: {error}"
    return failed


def suite_of(base: type[ConfigContract], **attributes: Any) -> type[ConfigContract]:
    """A subclass of `base` as an author would write it."""
    return type("Suite", (base,), attributes)
