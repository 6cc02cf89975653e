"""Token files: both parts of a corpus as memory-mapped arrays, written once, shared by processes.

A store is an index (JSON, named by its key) that names two token files (raw little-endian ids,
named by their content). Files appear whole, by rename, and the index comes last: two processes
that fill one store at once write the same names, and a fill that is cut short leaves no index.
A token file that is shorter than its index says is not used, and written again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from workbench.errors import WorkbenchError
from workbench_data.tokenization import Tokenizer

FORMAT = 1
PARTS = ("train", "validation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartFacts:
    """What the index holds of one part.

    Attributes:
        file: name of its token file.
        sha256: of that file's content.
        tokens, num_bytes, documents: sizes; `num_bytes` is of text, one for each separator.
        exact: the tokenizer's byte lengths added up to the bytes of every piece of text.
    """

    file: str
    sha256: str
    tokens: int
    num_bytes: int
    documents: int
    exact: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a corpus: its tokens, `[N]`, and the facts of the index."""

    tokens_N: NDArray[Any]
    facts: PartFacts


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenStore:
    """The training and the validation part."""

    train: Part
    validation: Part


class PartWriter:
    """Writes one part into a temporary file of its folder, which `__exit__` removes."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._folder = folder
        self._dtype = tokenizer.dtype.newbyteorder("<")
        self._path = folder / f"{uuid4().hex}.tmp"
        self._file = self._path.open("xb")
        self._sha256 = hashlib.sha256()
        self._num_bytes, self._exact = 0, True
        self.tokens, self.documents = 0, 0

    def open_document(self) -> None:
        """Begin the next document: all but the first have a separator before them."""
        if self.documents:
            self._write(np.array([self._tokenizer.separator]), 1)
        self.documents += 1

    def add(self, ids_N: NDArray[Any], num_bytes: int) -> None:
        """Append the tokens of a piece of text that is `num_bytes` long."""
        self._write(ids_N, num_bytes)
        self._exact = self._exact and int(self._tokenizer.byte_lengths[ids_N].sum()) == num_bytes

    def _write(self, ids_N: NDArray[Any], num_bytes: int) -> None:
        data = ids_N.astype(self._dtype).tobytes()
        self._file.write(data)
        self._sha256.update(data)
        self.tokens += len(ids_N)
        self._num_bytes += num_bytes

    def publish(self) -> PartFacts:
        """Give the file its name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        digest = self._sha256.hexdigest()
        name = f"{digest[:24]}.{self._tokenizer.dtype}"
        os.replace(self._path, self._folder / name)
        return PartFacts(
            file=name,
            sha256=digest,
            tokens=self.tokens,
            num_bytes=self._num_bytes,
            documents=self.documents,
            exact=self._exact,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


def cached(
    folder: Path, key: Any, tokenizer: Tokenizer, fill: Callable[[PartWriter, PartWriter], None]
) -> TokenStore:
    """The store of `key`, filled on first use.

    Args:
        folder: made if it is not there.
        key: JSON data that decides the content.
        fill: writes the training part and the validation part.

    Raises:
        WorkbenchError: the folder cannot be written or read.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, tokenizer.fingerprint, key]).encode()).hexdigest()
    index = folder / f"{digest[:24]}.json"
    store = _read(index, tokenizer)
    if store is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(index, tokenizer, fill)
        except OSError as error:
            raise WorkbenchError(
                f"cannot write the token cache in {folder}: {error.strerror or error}. "
                "Free some space there, or choose another cache folder."
            ) from error
        store = _read(index, tokenizer)
    if store is None:
        raise WorkbenchError(
            f"the token cache {index} was changed while it was being filled: try again"
        )
    return store


def _write(
    index: Path, tokenizer: Tokenizer, fill: Callable[[PartWriter, PartWriter], None]
) -> None:
    with ExitStack() as stack:
        writers = [stack.enter_context(PartWriter(index.parent, tokenizer)) for _ in PARTS]
        fill(*writers)
        facts = [dataclasses.asdict(writer.publish()) for writer in writers]
    path = index.parent / f"{uuid4().hex}.tmp"
    try:
        path.write_text(json.dumps(dict(zip(PARTS, facts, strict=True)), indent=2))
        os.replace(path, index)
    finally:
        path.unlink(missing_ok=True)


def _read(index: Path, tokenizer: Tokenizer) -> TokenStore | None:
    """The store of an index, or None if any of it is missing, malformed or cut short."""
    try:
        data = json.loads(index.read_text(encoding="utf-8"))
        parts = {name: _map(index.parent, PartFacts(**data[name]), tokenizer) for name in PARTS}
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return TokenStore(**parts)


def _map(folder: Path, facts: PartFacts, tokenizer: Tokenizer) -> Part:
    """Map a token file.

    Raises:
        OSError, ValueError: it is missing or its size is wrong.
    """
    path = folder / facts.file
    dtype = tokenizer.dtype.newbyteorder("<")
    if path.stat().st_size != facts.tokens * dtype.itemsize:
        raise ValueError(f"{path} has the wrong size")
    # A file of no bytes cannot be mapped.
    tokens_N = np.memmap(path, dtype=dtype, mode="r") if facts.tokens else np.empty(0, dtype)
    return Part(tokens_N=np.asarray(tokens_N), facts=facts)
