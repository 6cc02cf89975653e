"""Where a plugin came from, exactly: package and version, and the content of its sources."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import sys
from collections.abc import Mapping
from importlib.metadata import Distribution
from pathlib import Path
from types import ModuleType

from workbench.neighbours import SOURCES, Neighbours, source_files

SHORT = 12  # digits of a digest that people compare


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a plugin came from.

    Attributes:
        plugin: its entry point's name, or its file's stem.
        package: distribution, None for a file of a plugin folder.
        version: of the distribution, or the beginning of `sha256` as `sha256:…`.
        module: dotted name.
        file: path of the module.
        sha256: of the sources, see `source_digest`; empty where they are no files.
    """

    plugin: str
    package: str | None
    version: str
    module: str
    file: str
    sha256: str = ""

    def __str__(self) -> str:
        """`package version`, and the sources' digest where the version does not hold it."""
        name = f"{self.package or self.plugin} {self.version}"
        return name if self.package is None else f"{name} sha256:{self.sha256[:SHORT]}"

    def to_dict(self) -> dict[str, str | None]:
        return dataclasses.asdict(self)

    def public(self) -> dict[str, str | None]:
        """`to_dict` without the file: where it lay on this machine is nobody else's concern."""
        return {name: value for name, value in self.to_dict().items() if name != "file"}


def source_digest(module: ModuleType, distribution: Distribution | None = None) -> str:
    """sha256 of a loaded plugin's sources as they are on disk, 64 hex digits.

    The sources are the whole top-level package that the module lies in, or its file alone, and
    every module and package beside it that these import: at the top or in a function, directly
    or through others. Beside it means in the same folder, and of the same distribution where
    that lists its files. Of a namespace package only the distribution's own part counts. The
    workbench itself and what else is installed do not count; nor does what is imported by a
    name that is put together at run time, nor data beside a module that lies in no package.

    One file gives what `sha256sum` prints; of more, the names count, too. An editable install
    changes without its version.

    Args:
        module: as it was loaded; what it imports may have put folders on `sys.path`.
        distribution: what it was installed with, None for a file of a plugin folder.
    """
    file = Path(getattr(module, "__file__", None) or "")
    if not file.is_file():
        return ""
    listed = frozenset() if distribution is None else _listed(distribution)
    if str(file) not in listed:
        listed = frozenset()  # an editable install lists only what leads to its sources
    places, shared = _places(module, file)
    sources = {
        path: place
        for place in places
        for path in source_files(place)
        if str(path) in listed or not (shared and listed)
    }
    neighbours = Neighbours(places[0], listed, distribution)
    sources |= dict.fromkeys(neighbours.imported_by(sources), places[0])
    if list(sources.items()) == [(file, file)]:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    return _digest_of(sources, neighbours.contents)


def _digest_of(sources: Mapping[Path, Path], contents: Mapping[Path, bytes]) -> str:
    """Of files, each with the package's folder or the file that its name is relative to.

    Args:
        contents: of those that were read already.
    """
    digest = hashlib.sha256()
    for path, place in sources.items():
        content = contents[path] if path in contents else path.read_bytes()
        name = os.path.relpath(path, place.parent if place.is_file() else place)
        digest.update(f"{name.replace(os.sep, '/')}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


@functools.lru_cache(maxsize=16)  # one distribution may bring many plugins
def _listed(distribution: Distribution) -> frozenset[str]:
    """Paths of the source files that a distribution says it installed."""
    root = str(distribution.locate_file(""))
    return frozenset(
        os.path.normpath(os.path.join(root, name))
        for name in map(str, distribution.files or ())
        if os.path.splitext(name)[1] in SOURCES
    )


def _places(module: ModuleType, file: Path) -> tuple[list[Path], bool]:
    """The folders of a module's top-level package, or its file; and whether others share them."""
    package = sys.modules.get(module.__name__.partition(".")[0], module)
    folders = [Path(folder) for folder in getattr(package, "__path__", ())]
    is_namespace = getattr(package, "__file__", None) is None
    if is_namespace:
        folders = [folder for folder in folders if file.is_relative_to(folder)]
    return folders or [file], is_namespace
