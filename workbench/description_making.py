"""Makes the descriptions that are shipped: `python -m workbench.description_making`.

`make wheel` and the Makefile's installation run it. It describes every preset of the workbench's
own plugins, whatever else is installed, and writes the archive that `description_shipped.py`
reads. The same sources give the same bytes.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import zipfile
from collections.abc import Iterator, Set
from importlib.metadata import EntryPoint, distribution, packages_distributions
from pathlib import Path
from types import FrameType
from typing import Any

from workbench.description_entry import write_entry
from workbench.description_shipped import ARCHIVE, made_from, member, plugin_points
from workbench.description_sources import ABSENT
from workbench.discovery import DISABLE
from workbench.errors import WorkbenchError
from workbench.files import replacing
from workbench.neighbours import CORE

DISTRIBUTION = "lm-workbench"


def make(archive: Path = ARCHIVE) -> list[str]:
    """Describe the presets and write them; their names.

    Raises:
        WorkbenchError: a built-in plugin does not load or is no package, or a source changed
            meanwhile.
        DiskError: the archive cannot be written.
    """
    points = [p for p in distribution(DISTRIBUTION).entry_points if p.group.startswith(CORE)]
    before = made_from(points, ())
    if ABSENT in before["sources"].values():
        raise WorkbenchError(f"no package, or not to be read: {before['sources']}")
    strangers = {point.name for point in plugin_points()} - {point.name for point in points}
    with _left_out(strangers):
        texts = _entries(points)
    if made_from(points, ()) != before:
        raise WorkbenchError("a source changed while the presets were described: make them again")
    with replacing(archive) as temporary, zipfile.ZipFile(temporary, "w") as file:
        for name, text in sorted(texts.items()):
            # Of no date, for the same sources are to give the same wheel.
            file.writestr(zipfile.ZipInfo(member(name)), text, zipfile.ZIP_DEFLATED)
    return sorted(texts)


def _entries(points: list[EntryPoint]) -> dict[str, str]:
    from workbench.builder import Builder
    from workbench.description import Description, describe_layout
    from workbench.description_conditions import Conditions

    builder = Builder.load()
    plugins, names = builder.plugins, list(builder.presets)
    if plugins.failures:
        reasons = (f"{failure.plugin}: {failure.reason}" for failure in plugins.failures.values())
        raise WorkbenchError(f"plugins that do not load: {'; '.join(reasons)}")

    def describe(name: str, builder: Builder) -> Description:
        preset = builder.presets[name]
        layout = preset.layout()
        return describe_layout(builder, layout, Conditions(), name=name, preset=preset)

    for name in names:
        describe(name, builder)  # imports, which run code of their own, are done after this
    homes = packages_distributions()
    texts = {}
    for name in names:
        builder = Builder(plugins)  # a builder computes nothing twice
        with watched() as packages:
            description = describe(name, builder)
        others = {home for package in packages for home in homes.get(package, ())}
        texts[name] = write_entry(description, made_from(points, others - {DISTRIBUTION}))
    return texts


@contextlib.contextmanager
def watched() -> Iterator[set[str]]:
    """A set that gets the top-level names of all modules whose functions are called inside.

    Without garbage collection: what it calls belongs to whatever this process did before.
    """
    seen: set[str] = set()

    def note(frame: FrameType, event: str, function: Any) -> None:
        if event == "call":
            seen.add(str(frame.f_globals.get("__name__")).partition(".")[0])
        elif event == "c_call":
            owner = getattr(function, "__self__", None)
            owner = owner if isinstance(owner, type) else type(owner)
            seen.add(str(function.__module__ or owner.__module__).partition(".")[0])

    collecting = gc.isenabled()
    gc.disable()
    sys.setprofile(note)
    try:
        yield seen
    finally:
        sys.setprofile(None)
        if collecting:
            gc.enable()


@contextlib.contextmanager
def _left_out(plugins: Set[str]) -> Iterator[None]:
    """Inside, these plugins are not loaded, and all others are."""
    before = os.environ.get(DISABLE)
    os.environ[DISABLE] = ",".join(sorted(plugins))
    try:
        yield
    finally:
        if before is None:
            del os.environ[DISABLE]
        else:
            os.environ[DISABLE] = before


if __name__ == "__main__":
    try:
        make()
    except WorkbenchError as error:
        sys.exit(f"error: {error}")
