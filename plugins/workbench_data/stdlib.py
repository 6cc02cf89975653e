"""The embedded corpus: the standard-library sources of the Python that runs, as bytes."""

from __future__ import annotations

import dataclasses
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from workbench.errors import FieldError, WorkbenchError
from workbench_data.documents import (
    Document,
    check_share,
    is_held_out,
    read_document,
    store_documents,
)
from workbench_data.store import TokenStore
from workbench_data.token_source import TokenSource
from workbench_data.tokenization import ByteTokenizer, Tokenizer

# Not the standard library's: installed packages, and what the build wrote about its machine.
NOT_OURS = ("site-packages", "dist-packages", "__pycache__", "config-")
GENERATED = "_sysconfigdata"
TEST_FOLDERS = {"test", "tests", "idle_test"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    include_tests: Annotated[
        bool, "train on the test suites too, where this Python has them (12 MB become 31 MB)"
    ] = True
    validation_share: Annotated[float, "share of the library's files held out, by hash"] = 0.05
    validation_bytes: Annotated[
        int, "about how many held-out bytes are judged, evenly spread (above what there is: all)"
    ] = 65_536

    def __post_init__(self) -> None:
        check_share("validation_share", self.validation_share)
        if self.validation_bytes < 1:
            raise FieldError("validation_bytes", f"must be at least 1, got {self.validation_bytes}")


class StandardLibrary(TokenSource):
    """Every `.py` file of the standard library, one token a byte, zero bytes between files.

    A file is held out if the hash of its content says so, whatever the seed: validation figures of
    different seeds compare, and most files keep their side from one Python to the next.
    Test suites are never held out, as many Pythons come without them: the validation part of one
    Python version is the same with and without. A file whose content came before is left out.

    Raises:
        WorkbenchError: this Python has its library in an archive, or compiled only.
    """

    Config = Config

    def _open(self) -> tuple[Tokenizer, TokenStore, int]:
        root = Path(sysconfig.get_paths()["stdlib"])
        train, validation = split_library(root, self.config)
        if not train or not validation:
            raise WorkbenchError(
                f"this Python keeps no library sources in {root}: use the data source 'text' with "
                "files of your own, or a Python installed with its sources"
            )
        tokenizer = ByteTokenizer()
        store = store_documents(self.cache_dir / "tokens", tokenizer, train, validation)
        return tokenizer, store, self.config.validation_bytes

    def _facts(self) -> dict[str, Any]:
        return {
            "python_version": platform.python_version(),
            "split": "library files by the hash of their content; test suites are only trained on",
        }


def split_library(root: Path, config: Config) -> tuple[list[Document], list[Document]]:
    """The training and the validation files of a library folder, each in sorted order."""
    train: list[Document] = []
    validation: list[Document] = []
    seen: set[str] = set()
    for is_test, name in sorted(_library_files(root)):
        if is_test and not config.include_tests:
            continue
        document = read_document(root / name)
        if document.stop == 0 or document.digest in seen:
            continue
        seen.add(document.digest)
        held_out = not is_test and is_held_out(document.digest, config.validation_share)
        (validation if held_out else train).append(document)
    return train, validation


def _library_files(root: Path) -> Iterator[tuple[bool, str]]:
    """Whether it belongs to a test suite, and its path relative to `root`, of each source file."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(NOT_OURS)]
        inside = Path(folder).relative_to(root)
        is_test = not TEST_FOLDERS.isdisjoint(inside.parts)
        for name in files:
            if name.endswith(".py") and not name.startswith(GENERATED):
                yield is_test, (inside / name).as_posix()
