"""What a description was computed from, as stamps of the files: had and compared without torch.

Two parts. `surroundings` is Python, the environment variables that the workbench reads, and
what is installed: one look at the folders of `sys.path`. `loaded_sources` are the files that the
modules loaded by now came from, the workbench's and the plugins' among them, by content; of what
else is installed (torch, say) the first part speaks.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from workbench.neighbours import CORE, SOURCES

INSTALLED = (".dist-info", ".egg-info", ".pth")
SITE = {"site-packages", "dist-packages"}
ABSENT = "absent"
# Of longer files, and of those that hold no source, size and times are compared.
LONGEST = 1 << 20  # bytes

Places = Mapping[str, str]


def surroundings() -> str:
    """A digest of all that decides which modules an import finds, and what they are told."""
    variables = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("WORKBENCH_", "PYTHON")) and name != "WORKBENCH_CACHE"
    }
    facts = [sys.version, sys.platform, sys.prefix, str(sys.flags), *sys.path]
    facts += [f"{name}={variables[name]}" for name in sorted(variables)]
    for folder in sys.path:
        facts += _installed(folder or os.getcwd())
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()


def _installed(folder: str) -> list[str]:
    """A folder's own time, which a new module changes, and what was installed there, when."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return [f"{folder} {ABSENT}"]
    # Files that differ only in what they hold: entry points, and paths of editable installs.
    paths = [os.path.join(folder, name) for name in names if name.endswith(INSTALLED)]
    paths += [os.path.join(path, "entry_points.txt") for path in paths]
    return [f"{path} {_times(path)}" for path in (folder, *paths)]


def _times(path: str) -> str:
    try:
        found = os.stat(path)
    except OSError:
        return ABSENT
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def loaded_sources(plugins: Iterable[str], plugin_dirs: Iterable[str]) -> dict[str, str]:
    """Places by path, each with its digest (see `digest`).

    A package's place is its folder, with all that lies in it; a module's in no package is the
    folder that it lies in, without the folders in there, for data may lie beside it. A place
    of the second kind is written with a `/` at its end.

    Args:
        plugins: dotted names of the plugins' modules: they count wherever they are installed.
        plugin_dirs: folders whose files are plugins, loaded or not.
    """
    always = {CORE, *(name.partition(".")[0] for name in plugins)}
    places = {f"{os.path.abspath(folder)}/" for folder in plugin_dirs}
    standard = _standard_folders()
    for name, file in _module_files():
        top = name.partition(".")[0]
        if top in always or not (file.startswith(standard) or SITE & {*Path(file).parts}):
            places.add(_place(top, file))
    return {place: digest(place) for place in sorted(places)}


def _standard_folders() -> tuple[str, ...]:
    names = ("stdlib", "platstdlib")
    return tuple(f"{sysconfig.get_path(name)}{os.sep}" for name in names)


def _module_files() -> Iterator[tuple[str, str]]:
    main = sys.modules.get("__main__")  # what started the process: it decides nothing
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__dict__", {}).get("__file__")
        if isinstance(file, str) and module is not main:
            yield name, os.path.abspath(file)


def _place(top: str, file: str) -> str:
    package = getattr(sys.modules.get(top), "__dict__", {})
    start = package.get("__file__")
    if isinstance(start, str) and "__path__" in package:
        folder = os.path.dirname(os.path.abspath(start))
        if file.startswith(f"{folder}{os.sep}"):
            return folder
    return f"{os.path.dirname(file)}/"


def digest(place: str) -> str:
    """sha256 of the files of a place: names, and contents or times; hidden ones do not count."""
    if not os.path.isdir(place):
        return ABSENT
    found = hashlib.sha256()
    for path in _files(place):
        found.update(f"{path}\0".encode(errors="surrogateescape"))
        found.update(_content(path))
    return found.hexdigest()


def contents(folder: str) -> str:
    """sha256 of a package's sources: names within it and contents, wherever it is installed.

    Unlike `digest`, it is the same for a checkout and for what was installed from its wheel.
    """
    if not os.path.isdir(folder):
        return ABSENT
    found = hashlib.sha256()
    try:
        for path in _files(folder):
            if os.path.splitext(path)[1] in SOURCES:
                with open(path, "rb") as file:
                    content = file.read()
                name = os.path.relpath(path, folder).replace(os.sep, "/")
                found.update(f"{name}\0{len(content)}\0".encode(errors="surrogateescape"))
                found.update(content)
    except OSError:  # a link that leads nowhere, or a file that is no longer there
        return ABSENT
    return found.hexdigest()


def last_change(places: Iterable[str]) -> int:
    """When a file in there was last written or exchanged, in nanoseconds; 0 for no file."""
    latest = 0
    for path in (path for place in places for path in _files(place)):
        with contextlib.suppress(OSError):  # a link that leads nowhere
            found = os.stat(path)
            latest = max(latest, found.st_mtime_ns, found.st_ctime_ns)
    return latest


def _content(path: str) -> bytes:
    try:
        if os.path.splitext(path)[1] in SOURCES and os.path.getsize(path) <= LONGEST:
            with open(path, "rb") as file:
                return hashlib.sha256(file.read()).digest()
    except OSError:
        return ABSENT.encode()
    return _times(path).encode()


def _files(place: str) -> list[str]:
    found: list[str] = []
    seen: set[str] = set()  # a linked folder may lead back
    for folder, folders, names in os.walk(place, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [os.path.join(folder, name) for name in names if name[0] != "."]
        if place.endswith("/"):
            break
        folders[:] = [name for name in folders if name[0] != "." and name != "__pycache__"]
    return sorted(found)
