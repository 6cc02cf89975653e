"""What a plugin's sources import from the folder that they lie in."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Iterable, Set
from importlib.machinery import all_suffixes
from importlib.metadata import Distribution
from pathlib import Path

SOURCES = frozenset(
    {".py", ".pyx", ".json", ".toml", ".c", ".cc", ".cpp", ".h", ".cu", ".cuh", ".so"}
)
MODULES = tuple(all_suffixes())
CORE = "workbench"  # every plugin imports it, and is none the less itself


class Neighbours:
    """The modules and packages in the folder that a plugin's top-level package or file lies in.

    Args:
        place: that package's folder, or the file.
        listed: source files of its distribution; if none, all count that are no other's.
        distribution: its own.

    Attributes:
        contents: of the Python files that were read on the way.
    """

    def __init__(self, place: Path, listed: Set[str], distribution: Distribution | None) -> None:
        self.root = place.parent
        if listed:
            inside = f"{self.root}{os.sep}"
            names = {_stem(p.removeprefix(inside)) for p in listed if p.startswith(inside)}
        else:
            entries = list(os.scandir(self.root))
            names = {_stem(entry.name) for entry in entries if _may_be_module(entry)}
            names -= _claimed_names(entries, distribution)
        self.names = names - {CORE, _stem(place.name)}
        self._listed = listed
        self.contents: dict[Path, bytes] = {}

    def imported_by(self, paths: Iterable[Path]) -> list[Path]:
        """Source files of what the given ones import from here, directly or through others."""
        unseen = set(self.names)
        found: list[Path] = []
        waiting = list(paths)
        while waiting:
            names = {name for path in waiting for name in self._imports(path, unseen)}
            places = [self._place(name, unseen) for name in sorted(names)]
            new = dict.fromkeys(place for place in places if place is not None)
            unseen -= {_stem(place.name) for place in new}
            waiting = [path for place in new for path in self._files(place)]
            found += waiting
        return found

    def _files(self, place: Path) -> list[Path]:
        return [p for p in source_files(place) if not self._listed or str(p) in self._listed]

    def _imports(self, path: Path, possible: Set[str]) -> set[str]:
        """Top-level names that a file imports, if any of the possible ones may be among them."""
        if path.suffix != ".py":
            return set()
        source = self.contents[path] = path.read_bytes()
        # Parsing takes a hundred times as long as looking for the few names that can matter.
        return imported_names(source) if any(n.encode() in source for n in possible) else set()

    def _place(self, name: str, possible: Set[str]) -> Path | None:
        """Where a top-level name is imported from, if that is here and among the possible."""
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):  # loaded by hand, without a spec
            spec = None
        if spec is None:  # perhaps its folder was on sys.path only while the plugin was loaded
            places = [self.root / name, *sorted(self.root.glob(f"{name}.*"))]
            places = [p for p in places if p.is_dir() or p.name.endswith(MODULES)]
        else:
            origin = [spec.origin] if spec.has_location and spec.origin else []
            places = [Path(place) for place in spec.submodule_search_locations or origin]
        for place in places:
            named = _stem(place.name) in possible and place.exists()
            if named and os.path.samefile(place.parent, self.root):
                return self.root / place.name
        return None


def imported_names(source: bytes) -> set[str]:
    """Top-level names that a Python source imports anywhere, with `import_module`, too."""
    names: list[str | None] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes, which whoever imports it hears of
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return set()  # a template, perhaps; nobody imports it
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module)
        elif isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            name = getattr(node.args[0], "value", None)
            if called in ("import_module", "__import__") and isinstance(name, str):
                names.append(name)
    return {name.partition(".")[0] for name in names if name}


def _stem(path: str) -> str:
    """The importable name that the first part of a relative path may have."""
    return re.split(r"[/\\.]", path, maxsplit=1)[0]


def _may_be_module(entry: os.DirEntry[str]) -> bool:
    if not entry.is_dir():
        return entry.name.endswith(MODULES)
    # A folder without __init__.py is a package, too, where nothing better has its name.
    return os.path.isfile(os.path.join(entry.path, "__init__.py")) or entry.name in sys.modules


def _claimed_names(entries: Iterable[os.DirEntry[str]], own: Distribution | None) -> set[str]:
    """Names that other distributions say are theirs, if these are of an installation folder."""
    infos = [Path(entry.path) for entry in entries if entry.name.endswith(".dist-info")]
    own_name = _normal(own.name) if infos and own is not None else ""
    claimed = set()
    for info in infos:
        name = info.name.partition("-")[0]
        if _normal(name) == own_name:
            continue
        claimed.add(name)
        for paths in (info / "top_level.txt", info / "RECORD"):
            if paths.is_file():
                lines = paths.read_text("utf-8", "replace").splitlines()
                claimed |= {_stem(line) for line in lines}
    return claimed


def _normal(name: str) -> str:
    """A distribution's name as that of its folder gives it."""
    return re.sub(r"[-_.]+", "_", name).lower()


def source_files(place: Path) -> list[Path]:
    """The source files of a folder, in the order of their paths, or the one file."""
    if place.is_file():
        return [place]
    found = []
    for folder, folders, names in os.walk(place):
        folders[:] = [name for name in folders if name != "__pycache__"]
        found += [Path(folder, n) for n in names if os.path.splitext(n)[1] in SOURCES]
    return sorted(found)
