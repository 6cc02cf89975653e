"""Tokenizers: text as bytes, or as the tokens of a Hugging Face tokenizer.

Each knows how many bytes of text every token stands for, so that bits per byte compare across
vocabularies. The mark between two documents counts as one byte in all of them.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from workbench.errors import FieldError, WorkbenchError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

T = TypeVar("T")
BATCH_BYTES = 1 << 22  # text encoded in one call: enough to keep every core busy


class Tokenizer(ABC):
    """Bytes of text to token ids and back.

    Attributes:
        name: for people.
        fingerprint: equal for tokenizers that give equal ids.
        vocab_size: ids are below this.
        separator: the id between two documents.
        byte_lengths: int64 `[vocab_size]`, bytes of text a token stands for; where that depends
            on its neighbours, a guess that `TokenSource` only relies on when it adds up.
    """

    name: str
    fingerprint: str
    vocab_size: int
    separator: int
    byte_lengths: NDArray[np.int64]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The narrowest unsigned type that holds every id: uint8, uint16 or uint32."""
        return np.min_scalar_type(self.vocab_size - 1)

    @abstractmethod
    def encode_batch(self, texts: Sequence[bytes]) -> list[NDArray[Any]]:
        """Token ids of each text.

        Raises:
            UnicodeDecodeError: a tokenizer of characters met a text that is not UTF-8.
        """

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids; what is no whole UTF-8 shows as U+FFFD."""


class ByteTokenizer(Tokenizer):
    """One token a byte; documents are separated by a zero byte."""

    name = "bytes"
    fingerprint = "bytes"
    vocab_size = 256
    separator = 0
    byte_lengths = np.ones(256, dtype=np.int64)

    def encode_batch(self, texts: Sequence[bytes]) -> list[NDArray[Any]]:
        return [np.frombuffer(text, dtype=np.uint8) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of the Hugging Face `tokenizers` library.

    Special tokens are never read out of text: a document that spells `</s>` stays a document.

    Args:
        name: a `tokenizer.json`, a folder that holds one, or an id on the hub.
        end_of_document: the token between documents; None takes the tokenizer's end of sequence.

    Raises:
        WorkbenchError: it cannot be loaded.
        FieldError: `end_of_document` is none of its tokens, or must be given.
    """

    def __init__(self, name: str, end_of_document: str | None = None) -> None:
        self.name = name
        self._fast, default = _load(name)
        self._fast.no_truncation()
        self._fast.no_padding()
        self._fast.encode_special_tokens = True
        self.separator = _separator(self._fast, end_of_document or default, name)
        text = f"{self._fast.to_str()}\n{self.separator}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self.byte_lengths = _byte_lengths(self._fast)
        self.byte_lengths[self.separator] = 1
        self.vocab_size = len(self.byte_lengths)

    def encode_batch(self, texts: Sequence[bytes]) -> list[NDArray[Any]]:
        decoded = [text.decode("utf-8") for text in texts]
        found = self._fast.encode_batch_fast(decoded, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in found]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._fast.decode(list(tokens), skip_special_tokens=False))


def make_tokenizer(name: str | None, end_of_document: str | None) -> Tokenizer:
    """The tokenizer a Config names; None is bytes.

    Raises:
        FieldError, WorkbenchError: as `HuggingFaceTokenizer`.
    """
    if name is not None:
        return HuggingFaceTokenizer(name, end_of_document)
    if end_of_document is not None:
        raise FieldError("end_of_document", "needs a tokenizer: bytes are separated by a zero byte")
    return ByteTokenizer()


def encode_all(
    tokenizer: Tokenizer, pieces: Iterable[tuple[T, bytes]]
) -> Iterator[tuple[T, NDArray[Any], int]]:
    """Each piece's label, token ids and length in bytes, in order; encoded in large batches."""
    batch: list[tuple[T, bytes]] = []
    size = 0
    for label, text in pieces:
        batch.append((label, text))
        size += len(text)
        if size >= BATCH_BYTES:
            yield from _encode(tokenizer, batch)
            batch, size = [], 0
    yield from _encode(tokenizer, batch)


def _encode(
    tokenizer: Tokenizer, batch: list[tuple[T, bytes]]
) -> Iterator[tuple[T, NDArray[Any], int]]:
    found = tokenizer.encode_batch([text for _, text in batch])
    for (label, text), ids in zip(batch, found, strict=True):
        yield label, ids, len(text)


def _load(name: str) -> tuple[FastTokenizer, str | None]:
    """The tokenizer and the token that ends its sequences, if it tells."""
    from tokenizers import Tokenizer as FastTokenizer  # here, for whoever never reads one

    path = Path(name)
    try:
        if path.is_file():
            return FastTokenizer.from_file(str(path)), None
        tokenizer = FastTokenizer.from_file(str(_file(name, "tokenizer.json")))
    except Exception as error:  # `tokenizers` raises plain Exception
        raise WorkbenchError(
            f"tokenizer {name!r} cannot be loaded ({error}). Name a tokenizer.json, a folder that "
            "holds one, or an id on the Hugging Face hub that does (it must be reachable the first "
            "time)."
        ) from error
    return tokenizer, _end_of_sequence(name)


def _file(name: str, file: str) -> Path:
    """Where a tokenizer's file lies: in its folder, or downloaded from the hub."""
    if Path(name).is_dir():
        return Path(name) / file
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, file))


def _end_of_sequence(name: str) -> str | None:
    from huggingface_hub.errors import EntryNotFoundError

    try:
        text = _file(name, "tokenizer_config.json").read_text(encoding="utf-8")
    except (FileNotFoundError, EntryNotFoundError):
        return None
    token: dict[str, Any] | str | None = json.loads(text).get("eos_token")
    return str(token["content"]) if isinstance(token, dict) else token


def _separator(fast: FastTokenizer, token: str | None, name: str) -> int:
    special = [str(added.content) for added in fast.get_added_tokens_decoder().values()]
    if token is None:
        raise FieldError(
            "end_of_document",
            f"tokenizer {name!r} does not say which token ends a text: name one of its special "
            f"tokens ({', '.join(special) or 'it has none: any token will do'})",
        )
    found = fast.token_to_id(token)
    if found is None:
        raise FieldError(
            "end_of_document",
            f"{token!r} is no token of {name!r}; its special tokens: "
            f"{', '.join(special) or 'none'}",
        )
    return int(found)


def _byte_lengths(fast: FastTokenizer) -> NDArray[np.int64]:
    vocabulary = fast.get_vocab(with_added_tokens=True)
    lengths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    # Byte-level vocabularies spell every byte as one printable character.
    byte_level = '"ByteLevel"' in json.dumps(json.loads(fast.to_str())["pre_tokenizer"])
    added = {int(number) for number in fast.get_added_tokens_decoder()}
    for piece, number in vocabulary.items():
        if byte_level and number not in added:
            lengths[number] = len(piece)
        elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            lengths[number] = 1
        else:
            lengths[number] = len(piece.replace("▁", " ").encode())
    return lengths
