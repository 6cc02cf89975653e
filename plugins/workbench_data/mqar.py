"""Multi-query associative recall (MQAR): does a layer find again what it was told?

Shape suffixes: B batch, T tokens, P pairs, U a vocabulary's part, G gaps.

After Zoology (Arora et al., 2023, arXiv:2312.04927): P distinct keys, each followed by its value,
then every key once more, somewhere in the rest of the sequence; there, and only there, the value
is the target. The distance of a query follows a power law, as repetitions in text do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray

from workbench.config import Range
from workbench.data import Batch, DataSource
from workbench.errors import FieldError
from workbench.model import IGNORE
from workbench_data.sampling import TRAIN, VALIDATION, generator, uniform


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: Annotated[int, "keys are drawn from its lower half, values from its upper"] = 8192
    num_pairs: Annotated[
        int, Range(4, 256, log=True), "key-value pairs a sequence; seq_len must be 4 times that"
    ] = 8
    power: Annotated[float, "a of the gaps' power law, gap**(a - 1); 1.0 puts queries anywhere"] = (
        0.01
    )
    random_filler: Annotated[bool, "random tokens between the queries instead of token 0"] = False
    validation_examples: Annotated[int, "sequences that are judged"] = 512

    def __post_init__(self) -> None:
        if self.num_pairs < 1:
            raise FieldError("num_pairs", f"must be at least 1, got {self.num_pairs}")
        if self.vocab_size < 2 * self.num_pairs + 2:
            raise FieldError(
                "vocab_size",
                f"{self.vocab_size} has too few distinct keys and values for "
                f"{self.num_pairs} pairs: use at least {2 * self.num_pairs + 2}",
            )
        if self.power <= 0:
            raise FieldError("power", f"must be above 0, got {self.power}")
        if self.validation_examples < 1:
            raise FieldError(
                "validation_examples", f"must be at least 1, got {self.validation_examples}"
            )


class MultiQueryRecall(DataSource):
    """Synthetic recall; judge it by accuracy.

    Every sequence is made when it is asked for. Training and validation draw from different
    streams of the generator; the validation part is the same for every seed.
    """

    Config = Config

    def __init__(self, config: Any, *, seed: int = 0, cache_dir: Path) -> None:
        super().__init__(config, seed=seed, cache_dir=cache_dir)

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    def train_batch(self, step: int, batch_size: int, length: int) -> Batch:
        """See `DataSource`.

        Raises:
            FieldError: the pairs and their queries do not fit into `length` tokens.
        """
        bits = generator(seed=self.seed, stream=TRAIN, step=step)
        return _batch(make_examples(self.config, bits, batch_size, length))

    def validation_batches(self, batch_size: int, length: int) -> Iterator[Batch]:
        """See `DataSource`; an example does not depend on the batch it comes in.

        Raises:
            FieldError: the pairs and their queries do not fit into `length` tokens.
        """
        for first in range(0, self.config.validation_examples, batch_size):
            last = min(first + batch_size, self.config.validation_examples)
            examples = [
                make_examples(
                    self.config, generator(seed=0, stream=VALIDATION, step=number), 1, length
                )
                for number in range(first, last)
            ]
            inputs_BT, targets_BT = (np.concatenate(part) for part in zip(*examples, strict=True))
            yield _batch((inputs_BT, targets_BT))

    def describe(self) -> dict[str, Any]:
        return {
            "vocab_size": self.vocab_size,
            "num_pairs": self.config.num_pairs,
            "validation_examples": self.config.validation_examples,
            "validation_queries": self.config.validation_examples * self.config.num_pairs,
        }


def make_examples(
    config: Config, bits: np.random.Philox, batch_size: int, length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Inputs and targets, int64 `[B, T]`; a target is the value of the key at its position.

    Raises:
        FieldError: the pairs and their queries do not fit into `length` tokens.
    """
    pairs, vocab_size = config.num_pairs, config.vocab_size
    if length < 4 * pairs:
        fits = f"at most {length // 4}" if length >= 4 else "a longer seq_len"
        raise FieldError(
            "num_pairs",
            f"{pairs} pairs and their queries need a seq_len of {4 * pairs}, not {length}: "
            f"use {fits}",
        )
    half = vocab_size // 2
    keys_BP = 1 + _choose(uniform(bits, batch_size, half - 1), pairs)
    values_BP = half + _choose(uniform(bits, batch_size, vocab_size - half), pairs)
    num_gaps = (length - 2 * pairs) // 2
    weights_G = np.arange(1, num_gaps + 1, dtype=np.float64) ** (config.power - 1)
    # The exponential race: the first P of clocks with these rates are P draws without replacement.
    gaps_BP = _choose(-np.log(uniform(bits, batch_size, num_gaps)) / weights_G, pairs)
    queries_BP = 2 * pairs + 2 * gaps_BP

    inputs_BT = np.zeros((batch_size, length), dtype=np.int64)
    if config.random_filler:
        raw = np.asarray(bits.random_raw((batch_size, length)))
        inputs_BT = (raw % np.uint64(vocab_size)).astype(np.int64)
    inputs_BT[:, 0 : 2 * pairs : 2] = keys_BP
    inputs_BT[:, 1 : 2 * pairs : 2] = values_BP
    np.put_along_axis(inputs_BT, queries_BP, keys_BP, axis=1)
    targets_BT = np.full((batch_size, length), IGNORE, dtype=np.int64)
    np.put_along_axis(targets_BT, queries_BP, values_BP, axis=1)
    return inputs_BT, targets_BT


def _choose(scores_BU: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Indices of the `count` smallest scores of each row, smallest first."""
    if count < scores_BU.shape[1]:
        found_BP = np.argpartition(scores_BU, count, axis=1)[:, :count]
    else:
        found_BP = np.broadcast_to(np.arange(count), (len(scores_BU), count))
    order_BP = np.argsort(np.take_along_axis(scores_BU, found_BP, axis=1), axis=1)
    return np.take_along_axis(found_BP, order_BP, axis=1)


def _batch(example: tuple[NDArray[np.int64], NDArray[np.int64]]) -> Batch:
    inputs_BT, targets_BT = example
    return Batch(inputs_BT=torch.from_numpy(inputs_BT), targets_BT=torch.from_numpy(targets_BT))
