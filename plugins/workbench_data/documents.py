"""Documents that lie in files: read, fingerprinted, split into two parts, stored as tokens."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from workbench.errors import FieldError, WorkbenchError
from workbench_data.store import PartWriter, TokenStore, cached
from workbench_data.tokenization import Tokenizer, encode_all

BLOCK_BYTES = 1 << 18


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """A stretch of a file.

    Attributes:
        path: the file.
        start, stop: its first byte and the one after its last.
        digest: sha256 of the whole file, in hex.
    """

    path: Path
    start: int
    stop: int
    digest: str

    def blocks(self) -> Iterator[bytes]:
        """The bytes in pieces of about `BLOCK_BYTES`, each ending with a line where it can.

        A piece never ends inside a UTF-8 character.

        Raises:
            WorkbenchError: the file is gone, or shorter than it was.
        """
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise WorkbenchError(f"cannot read {self.path}: {error.strerror or error}") from error
        with file:
            file.seek(self.start)
            left = self.stop - self.start
            rest = b""
            while left:
                data = file.read(min(BLOCK_BYTES, left))
                if not data:
                    raise WorkbenchError(f"{self.path} became shorter while it was read: try again")
                left -= len(data)
                data = rest + data
                cut = _cut(data) if left else len(data)
                rest = data[cut:]
                if cut:
                    yield data[:cut]


def read_document(path: Path) -> Document:
    """A whole file as one document.

    Raises:
        WorkbenchError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
    except OSError as error:
        raise WorkbenchError(f"cannot read {path}: {error.strerror or error}") from error
    return Document(path=path, start=0, stop=size, digest=digest)


def is_held_out(digest: str, share: float) -> bool:
    """Whether a document of this hash belongs to the validation part.

    It depends on the content alone, not on names, order or a seed: more documents move none of
    the others, and two copies of one document are always on the same side.
    """
    return int(digest[:16], 16) < share * 2**64


def split_tails(
    documents: Iterable[Document], share: float
) -> tuple[list[Document], list[Document]]:
    """The last `share` of each document's bytes as validation; cuts fall between characters."""
    heads, tails = [], []
    for document in documents:
        cut = _character_start(document, document.stop - round(share * document.stop))
        heads.append(dataclasses.replace(document, stop=cut))
        tails.append(dataclasses.replace(document, start=cut))
    return _non_empty(heads), _non_empty(tails)


def check_share(name: str, share: float) -> None:
    """Raise FieldError unless `share` leaves something to both parts."""
    if not 0 < share < 1:
        raise FieldError(name, f"must lie between 0 and 1, got {share}")


def store_documents(
    folder: Path,
    tokenizer: Tokenizer,
    train: Sequence[Document],
    validation: Sequence[Document],
) -> TokenStore:
    """Both parts as tokens; cached by the documents' content and the tokenizer.

    Raises:
        WorkbenchError: a document is not UTF-8 and the tokenizer needs it to be, or the cache
            cannot be written.
    """
    key = [[(part.digest, part.start, part.stop) for part in side] for side in (train, validation)]

    def fill(train_writer: PartWriter, validation_writer: PartWriter) -> None:
        for writer, documents in ((train_writer, train), (validation_writer, validation)):
            _fill(writer, tokenizer, documents)

    return cached(folder, key, tokenizer, fill)


def _fill(writer: PartWriter, tokenizer: Tokenizer, documents: Sequence[Document]) -> None:
    pieces = (
        ((document, number == 0), block)
        for document in documents
        for number, block in enumerate(document.blocks())
    )
    try:
        for (_, is_first), ids, num_bytes in encode_all(tokenizer, pieces):
            if is_first:
                writer.open_document()
            writer.add(ids, num_bytes)
    except UnicodeDecodeError as error:
        raise WorkbenchError(
            f"tokenizer {tokenizer.name!r} needs UTF-8, and one of the files is not "
            f"({_first_undecodable(documents)}): convert it, or leave the tokenizer out and train "
            "on bytes."
        ) from error


def _first_undecodable(documents: Sequence[Document]) -> str:
    for document in documents:
        for block in document.blocks():
            try:
                block.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"{document.path}: {error.reason}"
    return "it changed meanwhile"


def _cut(data: bytes) -> int:
    """Where to end a piece: after its last line, or at least not inside a character."""
    cut = data.rfind(b"\n") + 1
    if cut:
        return cut
    cut = len(data) - 1
    while cut > 0 and _is_continuation(data[cut]):
        cut -= 1
    return cut


def _character_start(document: Document, at: int) -> int:
    with document.path.open("rb") as file:
        file.seek(at)
        following = file.read(4)
    for byte in following[:3]:
        if not _is_continuation(byte):
            break
        at += 1
    return at


def _is_continuation(byte: int) -> bool:
    return byte & 0b1100_0000 == 0b1000_0000


def _non_empty(documents: Iterable[Document]) -> list[Document]:
    return [document for document in documents if document.stop > document.start]
