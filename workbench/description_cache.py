"""Descriptions of presets kept on disk, so that what was described once is shown without torch.

An entry is one file: the sha256 of the rest, then JSON with what the description was computed
from (`description_sources.py`) and the description. It is used only if all of that is as it was;
any other is computed anew and written over. Nothing is kept of what may differ from call to call:
of trials and files, where a plugin did not load or printed something, or where a source changed
while it was loaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import stray_output
from workbench.description import Description, Row
from workbench.description_sources import digest, last_change, loaded_sources, surroundings
from workbench.errors import DiskError
from workbench.files import make_folder, replacing
from workbench.layout import Layout
from workbench.preset import Preset

if TYPE_CHECKING:
    from workbench.discovery import Plugins

FORMAT = 1
FOLDER = "WORKBENCH_CACHE"
# A file system's clock may be that much behind Python's.
TICK = 100_000_000  # nanoseconds


def cache_folder() -> Path | None:
    """`$WORKBENCH_CACHE`, else `lm-workbench` in the user's cache folder; None to keep nothing.

    Nothing is kept where the variable is empty, or there is no home folder.
    """
    named = os.environ.get(FOLDER)
    if named is not None:
        return Path(named) if named else None
    user = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(user):  # such a value is to be ignored, says the specification
        user = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(user, "lm-workbench") if os.path.isabs(user) else None


class DescriptionCache:
    """One request: what was kept for it, and keeping it.

    It neither finds nor keeps anything in a process that has torch: there is no time to save, and
    what was loaded before may not be what lies on disk.

    Args:
        request: whatever the description depends on that is no source: JSON data.
        plugin_dirs: folders whose files are plugins, too; absolute.
    """

    def __init__(self, request: Mapping[str, Any], plugin_dirs: tuple[str, ...] = ()) -> None:
        self.started = time.time_ns()
        self.plugin_dirs = plugin_dirs
        text = json.dumps([sys.prefix, dict(request), plugin_dirs], sort_keys=True)
        folder = None if "torch" in sys.modules else cache_folder()
        key = hashlib.sha256(text.encode()).hexdigest()
        self.path = None if folder is None else folder / "descriptions" / f"{key}.txt"
        self.surroundings = "" if folder is None else surroundings()

    def find(self) -> Description | None:
        """What was kept, if everything that it was computed from is as it was then."""
        try:
            text = "" if self.path is None else self.path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            return None
        checksum, _, content = text.partition("\n")
        if checksum != _sha256(content):
            return None
        entry = json.loads(content)
        if entry["format"] != FORMAT or entry["surroundings"] != self.surroundings:
            return None
        if any(digest(place) != before for place, before in entry["sources"].items()):
            return None
        return _unpacked(entry["description"])

    def keep(self, description: Description, plugins: Plugins) -> None:
        """Write an entry, if the same request will give the same as long as no source changes.

        Raises:
            DiskError: it cannot be written.
        """
        if self.path is None or description.preset is None:
            return
        if plugins.failures or stray_output.named():
            return
        modules = [plugin.module for plugin in plugins.loaded.values()]
        sources = loaded_sources(modules, self.plugin_dirs)
        if last_change(sources) >= self.started - TICK:
            return  # what was loaded may not be what was read just now
        entry = {
            "format": FORMAT,
            "surroundings": self.surroundings,
            "sources": sources,
            "description": _packed(description),
        }
        content = json.dumps(entry, allow_nan=False)
        try:
            make_folder(self.path.parent)
            with replacing(self.path) as temporary:
                temporary.write_text(f"{_sha256(content)}\n{content}", "utf-8")
        except DiskError as error:
            raise DiskError(
                f"{error}; {FOLDER} names another folder for descriptions, or is set to nothing "
                "to keep none"
            ) from None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _packed(description: Description) -> dict[str, Any]:
    data = {
        field.name: getattr(description, field.name) for field in dataclasses.fields(Description)
    }
    preset = description.preset
    assert preset is not None
    return data | {
        "layout": description.layout.to_dict(),
        "blocks": [dataclasses.asdict(row) for row in description.blocks],
        "outside": [dataclasses.asdict(row) for row in description.outside],
        "total": dataclasses.asdict(description.total),
        "preset": {
            "source": preset.source,
            "stated_parameters": preset.stated_parameters,
            "assumptions": preset.assumptions,
        },
    }


def _unpacked(data: dict[str, Any]) -> Description:
    layout = Layout.from_dict(data["layout"])
    changed = {
        "layout": layout,
        "blocks": tuple(Row(**row) for row in data["blocks"]),
        "outside": tuple(Row(**row) for row in data["outside"]),
        "total": Row(**data["total"]),
        "preset": Preset(layout=lambda: layout, **data["preset"]),
    }
    return Description(**(data | changed))
