"""Descriptions of the built-in presets that were made before the workbench was installed.

They lie in one archive beside this module, an entry (`description_entry.py`) a preset.
`description_making.py` puts them there: for a wheel, and after an installation from a checkout.
Nobody described the preset in this environment yet, so an entry must say by itself what it holds
for. It is used only where all of these are as they were when it was made:

- the plugins that are installed, by entry points: the workbench's own, and no others;
- the sources of the workbench and of these plugins, by content;
- the release of every other distribution whose functions ran while it was computed (torch, where
  stored bytes are counted on a quantized layer; none, where formulas alone were computed).

Paths, times, Python and the other distributions do not count: sums of whole numbers, which costs
are, have one result. Requests for anything but a preset as it is are none of this module's.
"""

from __future__ import annotations

import importlib.util
import os
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from workbench.description import Description
from workbench.description_entry import described, read_entry
from workbench.description_sources import ABSENT, contents
from workbench.neighbours import CORE

ARCHIVE = Path(__file__).with_name("descriptions.zip")
# Where things are kept: no description of a preset depends on them.
PLACES = {"WORKBENCH_CACHE", "WORKBENCH_RUNS"}


def shipped(request: Mapping[str, Any], plugin_dirs: tuple[str, ...] = ()) -> Description | None:
    """What was shipped for a request, if describing now can give nothing else.

    Args:
        request: `source`, and the conditions that were asked for, None for none.
        plugin_dirs: folders whose files are plugins, too.
    """
    asked = {name for name, value in request.items() if value is not None}
    told = {name for name, value in os.environ.items() if name.startswith("WORKBENCH_") and value}
    if asked != {"source"} or plugin_dirs or told - PLACES:
        return None
    text = _text(str(request["source"]))
    entry = None if text is None else read_entry(text)
    if entry is None:
        return None
    before = entry["made_from"]
    now = made_from(plugin_points(), before.get("releases", ()))
    return described(entry) if before == now else None


def member(name: str) -> str:
    """A preset's place in the archive."""
    return f"{name}.txt"


def _text(name: str) -> str | None:
    try:
        with zipfile.ZipFile(ARCHIVE) as archive:
            return archive.read(member(name)).decode()
    # No archive, no such preset, or damage of one kind or another.
    except (OSError, EOFError, KeyError, ValueError, RuntimeError):
        return None
    except (zipfile.BadZipFile, zlib.error):
        return None


def plugin_points() -> list[EntryPoint]:
    """The entry points of all plugins that are installed, whatever API they were made for."""
    points = entry_points()
    groups = (group for group in points.groups if group.startswith(CORE))
    return [point for group in groups for point in points.select(group=group)]


def made_from(points: Iterable[EntryPoint], distributions: Iterable[str]) -> dict[str, Any]:
    """All that an entry depends on, as it is now: JSON data.

    Args:
        points: of the plugins.
        distributions: others whose functions it was computed with.
    """
    points = list(points)
    packages = {CORE, *(point.module.partition(".")[0] for point in points)}
    return {
        "plugins": sorted({f"{point.group}: {point.name} = {point.value}" for point in points}),
        "sources": {package: contents(folder_of(package)) for package in sorted(packages)},
        "releases": {name: _release(name) for name in sorted(distributions)},
    }


def folder_of(package: str) -> str:
    """Where an import finds a package; empty for no package, or one in several places."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return ""
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    return folders[0] if len(folders) == 1 else ""


def _release(distribution: str) -> str:
    """Its version without the label of a build: `2.13.0+cpu` and `2.13.0+cu130` are one release."""
    try:
        return str(version(distribution)).partition("+")[0]
    except PackageNotFoundError:
        return ABSENT
