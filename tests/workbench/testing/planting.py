"""Plants a fault: the working thing that `new-plugin` writes, with one edit of its source."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

from workbench.scaffold import plugin_files

Edit = tuple[str, str]
_numbers = itertools.count()


def source_of(kind: str) -> str:
    """The module of a freshly generated plugin; its class is `Good`."""
    return plugin_files("good", kind)["good.py"]


def edited(kind: str, *edits: Edit) -> str:
    """That source with pieces replaced, each of which must be there exactly once."""
    text = source_of(kind)
    for old, new in edits:
        assert text.count(old) == 1, f"{text.count(old)} times: {old}"
        text = text.replace(old, new)
    return text


def plant(folder: Path, kind: str, *edits: Edit) -> ModuleType:
    """That source as a module of its own."""
    name = f"planted_{next(_numbers)}"
    path = folder / f"{name}.py"
    path.write_text(edited(kind, *edits), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
