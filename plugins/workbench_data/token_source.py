"""What the data sources of text share: windows over a token store, exact bytes, encode and decode.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from workbench.data import Batch, DataSource
from workbench.errors import FieldError, WorkbenchError
from workbench.model import IGNORE
from workbench_data.sampling import gather, random_starts, validation_starts
from workbench_data.store import Part, TokenStore
from workbench_data.tokenization import Tokenizer


class TokenSource(DataSource):
    """A data source over two token arrays.

    A training batch is `batch_size` windows that begin anywhere in the training part, drawn for
    its step alone. The validation part is cut into windows one after the other, each target
    judged once; where `validation_limit` is below the part's size, windows are taken at even
    distances all over it, always the same ones. Windows cross from one document into the next.
    Neither part depends on the seed, so validation figures of different seeds compare.

    Attributes:
        tokenizer: text to ids and back.
        store: the two parts.
        validation_limit: about how many validation tokens are judged.
    """

    def __init__(self, config: Any, *, seed: int = 0, cache_dir: Path) -> None:
        super().__init__(config, seed=seed, cache_dir=cache_dir)
        self.tokenizer, self.store, self.validation_limit = self._open()
        if len(self.store.validation.tokens_N) < 2:
            raise WorkbenchError(
                "the validation part is empty: add data, or give it a larger share"
            )

    @abstractmethod
    def _open(self) -> tuple[Tokenizer, TokenStore, int]:
        """The tokenizer, the parts and the limit on judged tokens; called once."""

    @abstractmethod
    def _facts(self) -> dict[str, Any]:
        """What the source adds to `describe`."""

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def train_batch(self, step: int, batch_size: int, length: int) -> Batch:
        part = self.store.train
        starts_B = random_starts(len(part.tokens_N), batch_size, length, seed=self.seed, step=step)
        return self._batch(part, *gather(part.tokens_N, starts_B, length))

    def validation_batches(self, batch_size: int, length: int) -> Iterator[Batch]:
        part = self.store.validation
        starts_W = validation_starts(len(part.tokens_N), length, self.validation_limit)
        for first in range(0, len(starts_W), batch_size):
            starts_B = starts_W[first : first + batch_size]
            yield self._batch(part, *gather(part.tokens_N, starts_B, length))

    def _batch(self, part: Part, inputs_BT: Tensor, targets_BT: Tensor) -> Batch:
        kept = targets_BT[targets_BT != IGNORE].numpy()
        if part.facts.exact:
            num_bytes = float(self.tokenizer.byte_lengths[kept].sum())
        else:
            num_bytes = len(kept) * part.facts.num_bytes / part.facts.tokens
        return Batch(inputs_BT=inputs_BT, targets_BT=targets_BT, num_bytes=num_bytes)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without separators."""
        (ids,) = self.tokenizer.encode_batch([text.encode(errors="replace")])
        return [int(number) for number in ids]

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids; what is no whole UTF-8 shows as U+FFFD.

        Raises:
            FieldError: an id outside the vocabulary.
        """
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise FieldError(
                    "tokens", f"{token} is outside the vocabulary of {self.vocab_size}"
                )
        return self.tokenizer.decode(tokens)

    def describe(self) -> dict[str, Any]:
        parts = {"train": self.store.train, "validation": self.store.validation}
        hashes = "".join(part.facts.sha256 for part in parts.values())
        return {
            "tokenizer": self.tokenizer.name,
            "vocab_size": self.vocab_size,
            "content_hash": hashlib.sha256(hashes.encode()).hexdigest()[:16],
            **{name: _part_facts(part) for name, part in parts.items()},
            "validation_limit": self.validation_limit,
            **self._facts(),
        }


def _part_facts(part: Part) -> dict[str, Any]:
    facts = part.facts
    return {
        "documents": facts.documents,
        "tokens": facts.tokens,
        "bytes": facts.num_bytes,
        "bytes_per_token": facts.num_bytes / facts.tokens if facts.tokens else None,
        "byte_counts": "exact for every token" if facts.exact else "by the part's bytes a token",
        "sha256": facts.sha256,
    }
