"""Text of the user's own: files or glob patterns, as bytes or with a tokenizer."""

from __future__ import annotations

import dataclasses
import glob
from pathlib import Path
from typing import Annotated, Any

from workbench.errors import FieldError, WorkbenchError
from workbench_data.documents import (
    Document,
    check_share,
    is_held_out,
    read_document,
    split_tails,
    store_documents,
)
from workbench_data.store import TokenStore
from workbench_data.token_source import TokenSource
from workbench_data.tokenization import Tokenizer, make_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    paths: Annotated[tuple[str, ...], "files or glob patterns, from the current folder"]
    validation_paths: Annotated[
        tuple[str, ...], "the same for the validation part; such files are never trained on"
    ] = ()
    validation_share: Annotated[float, "held out where validation_paths is empty"] = 0.05
    validation_tokens: Annotated[
        int, "about how many held-out tokens are judged, evenly spread (above what there is: all)"
    ] = 65_536
    tokenizer: Annotated[
        str | None, "a tokenizer.json, a folder with one, or a hub id; without: bytes"
    ] = None
    end_of_document: Annotated[
        str | None, "token between documents; without: the tokenizer's end of sequence"
    ] = None

    def __post_init__(self) -> None:
        check_share("validation_share", self.validation_share)
        if not self.paths:
            raise FieldError("paths", "name at least one file or glob pattern")
        if self.validation_tokens < 1:
            raise FieldError(
                "validation_tokens", f"must be at least 1, got {self.validation_tokens}"
            )


class TextFiles(TokenSource):
    """Files as documents.

    What is held out: the files of `validation_paths`; without them, whole files by the hash of
    their content; where that would leave a part without a file (a few files, or one), the last
    `validation_share` of every file. `describe` says which. The seed has no part in it, so
    validation figures of different seeds compare.

    Raises:
        FieldError: a pattern matches nothing, or no training file is left.
        WorkbenchError: a file is empty or cannot be read, or the tokenizer cannot.
    """

    Config = Config

    def _open(self) -> tuple[Tokenizer, TokenStore, int]:
        config: Config = self.config
        tokenizer = make_tokenizer(config.tokenizer, config.end_of_document)
        train, validation, self._split = _split(config)
        store = store_documents(self.cache_dir / "tokens", tokenizer, train, validation)
        return tokenizer, store, config.validation_tokens

    def _facts(self) -> dict[str, Any]:
        return {"split": self._split}


def _split(config: Config) -> tuple[list[Document], list[Document], str]:
    documents = _read("paths", config.paths)
    if config.validation_paths:
        validation = _read("validation_paths", config.validation_paths)
        held_out = {document.digest for document in validation}
        train = [document for document in documents if document.digest not in held_out]
        if not train:
            raise FieldError("validation_paths", "hold out every file of paths: name fewer")
        return train, validation, "validation_paths"
    share = config.validation_share
    validation = [document for document in documents if is_held_out(document.digest, share)]
    train = [document for document in documents if not is_held_out(document.digest, share)]
    if train and validation:
        return train, validation, "files by the hash of their content"
    return *split_tails(documents, share), "the end of every file"


def _read(field: str, patterns: tuple[str, ...]) -> list[Document]:
    paths: set[Path] = set()
    for pattern in patterns:
        paths.update(_matches(field, pattern))
    documents = [read_document(path) for path in sorted(paths)]
    for document in documents:
        if document.stop == 0:
            raise WorkbenchError(f"{document.path} is empty: remove it, or leave it out of {field}")
    return documents


def _matches(field: str, pattern: str) -> list[Path]:
    # A name that exists is meant as it stands, even with brackets in it.
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise FieldError(field, f"{pattern!r} is a folder: write {str(path / '**' / '*.txt')!r}")
    if path.exists():
        return [path]
    found = [Path(name) for name in glob.glob(str(path), recursive=True)]
    files = [path for path in found if not path.is_dir()]
    if not files:
        raise FieldError(field, f"no file matches {pattern!r} in {Path.cwd()}")
    return files
