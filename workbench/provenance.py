"""Where a plugin came from, exactly: package and version, and the content of its sources."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

SOURCES = frozenset(
    {".py", ".pyx", ".json", ".toml", ".c", ".cc", ".cpp", ".h", ".cu", ".cuh", ".so"}
)
SHORT = 12  # digits of a digest that people compare


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a plugin came from.

    Attributes:
        plugin: its entry point's name, or its file's stem.
        package: distribution, None for a file of a plugin folder.
        version: of the distribution, or `sha256:…` of the file's content.
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


def source_digest(module: ModuleType) -> str:
    """sha256 of a plugin's sources as they are on disk, 64 hex digits.

    Of the module's file alone, where that is all (what `sha256sum` prints); else of all source
    files of its package, their names included. An editable install changes without its version.
    """
    file = getattr(module, "__file__", None)
    package = sys.modules.get(module.__name__.rpartition(".")[0], module)
    if getattr(package, "__file__", None) and hasattr(package, "__path__"):
        return _of_folders(Path(folder) for folder in package.__path__)
    if file is None or not Path(file).is_file():
        return ""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _of_folders(folders: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix in SOURCES and path.is_file():
                content = path.read_bytes()
                name = path.relative_to(folder).as_posix()
                digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
