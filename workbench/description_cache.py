"""Descriptions of presets kept on disk, so that what was described once is shown without torch.

An entry is one file (`description_entry.py`) with the description and what it was computed from
(`description_sources.py`). It is used only if all of that is as it was; any other is computed
anew and written over. Nothing is kept of what may differ from call to call: of trials and files,
where a plugin did not load or printed something, or where a source changed while it was loaded.
What nobody described here yet may have been described before the workbench was installed
(`description_shipped.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import stray_output
from workbench.description import Description
from workbench.description_entry import described, read_entry, write_entry
from workbench.description_shipped import shipped
from workbench.description_sources import digest, last_change, loaded_sources, surroundings
from workbench.errors import DiskError
from workbench.files import make_folder, replacing

if TYPE_CHECKING:
    from workbench.discovery import Plugins

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
        self.request = dict(request)
        self.plugin_dirs = plugin_dirs
        self.is_useful = "torch" not in sys.modules
        text = json.dumps([sys.prefix, self.request, plugin_dirs], sort_keys=True)
        folder = cache_folder() if self.is_useful else None
        key = hashlib.sha256(text.encode()).hexdigest()
        self.path = None if folder is None else folder / "descriptions" / f"{key}.txt"
        self.surroundings = "" if folder is None else surroundings()

    def find(self) -> Description | None:
        """What was kept or shipped, if everything that it was computed from is as it was then."""
        if not self.is_useful:
            return None
        return self._kept() or shipped(self.request, self.plugin_dirs)

    def _kept(self) -> Description | None:
        try:
            text = "" if self.path is None else self.path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            return None
        entry = read_entry(text)
        if entry is None or entry["made_from"]["surroundings"] != self.surroundings:
            return None
        sources = entry["made_from"]["sources"]
        if any(digest(place) != before for place, before in sources.items()):
            return None
        return described(entry)

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
        made_from = {"surroundings": self.surroundings, "sources": sources}
        try:
            make_folder(self.path.parent)
            with replacing(self.path) as temporary:
                temporary.write_text(write_entry(description, made_from), "utf-8")
        except DiskError as error:
            raise DiskError(
                f"{error}; {FOLDER} names another folder for descriptions, or is set to nothing "
                "to keep none"
            ) from None
