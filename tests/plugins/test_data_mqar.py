"""Multi-query associative recall: solvable by recall alone, distributed as published.

Shape suffixes: B batch, T tokens, P pairs, G gaps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from workbench.data import Batch
from workbench.errors import FieldError
from workbench.model import IGNORE
from workbench.testing import DataSourceContract
from workbench_data.mqar import Config, MultiQueryRecall
from workbench_data.sampling import TRAIN, generator

LENGTH = 64
CONFIGS = [
    Config(num_pairs=4, validation_examples=10),
    Config(num_pairs=16, vocab_size=34, power=1.0, random_filler=True, validation_examples=10),
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class TestContract(DataSourceContract):
    source = MultiQueryRecall
    configs: ClassVar[list[Any]] = CONFIGS
    length = LENGTH


def make(config: Config, *, seed: int = 0) -> MultiQueryRecall:
    return MultiQueryRecall(config, seed=seed, cache_dir=Path("never written"))


def batches(source: MultiQueryRecall) -> list[Batch]:
    return [source.train_batch(7, 32, LENGTH), *source.validation_batches(4, LENGTH)]


@pytest.mark.parametrize("config", CONFIGS)
def test_looking_a_key_up_answers_every_query(config: Config) -> None:
    for batch in batches(make(config)):
        for inputs, targets in zip(
            batch.inputs_BT.tolist(), batch.targets_BT.tolist(), strict=True
        ):
            told = inputs[: 2 * config.num_pairs]
            value_of = dict(zip(told[0::2], told[1::2], strict=True))
            asked = {at: target for at, target in enumerate(targets) if target != IGNORE}
            assert {at: value_of[inputs[at]] for at in asked} == asked
            assert sorted(inputs[at] for at in asked) == sorted(value_of), "each key asked once"


@pytest.mark.parametrize("config", CONFIGS)
def test_keys_are_distinct_and_from_the_lower_half(config: Config) -> None:
    for batch in batches(make(config)):
        told_BT = batch.inputs_BT[:, : 2 * config.num_pairs]
        keys_BP, values_BP = told_BT[:, 0::2], told_BT[:, 1::2]
        for part_BP in (keys_BP, values_BP):
            assert all(len(row.unique()) == config.num_pairs for row in part_BP)
        assert keys_BP.min() >= 1
        assert keys_BP.max() < config.vocab_size // 2 <= values_BP.min()
        assert values_BP.max() < config.vocab_size
        assert (batch.targets_BT[:, : 2 * config.num_pairs] == IGNORE).all()


def test_without_filler_the_rest_is_token_0() -> None:
    batch = make(CONFIGS[0]).train_batch(0, 32, LENGTH)
    rest_BT = batch.inputs_BT[:, 2 * 4 :]
    assert ((rest_BT != 0) == (batch.targets_BT[:, 2 * 4 :] != IGNORE)).all()


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_gaps_follow_the_power_law(power: float) -> None:
    """Against numpy's own weighted draws without replacement."""
    pairs, rows, length = 2, 4000, 24
    batch = make(Config(num_pairs=pairs, vocab_size=16, power=power)).train_batch(0, rows, length)
    found_G = (batch.targets_BT != IGNORE).sum(0).numpy()[2 * pairs :: 2]
    weights_G = np.arange(1, len(found_G) + 1) ** (power - 1)
    rng = np.random.default_rng(0)
    drawn = [
        rng.choice(len(weights_G), pairs, replace=False, p=weights_G / weights_G.sum())
        for _ in range(rows)
    ]
    expected_G = np.bincount(np.concatenate(drawn), minlength=len(weights_G))
    # The difference of two binomial counts: five standard deviations.
    spread_G = np.sqrt(2 * expected_G * (1 - expected_G / rows))
    assert (abs(found_G - expected_G) < 5 * spread_G).all()
    assert found_G.sum() == pairs * rows


def test_validation_is_shared_by_all_seeds_and_never_trained_on() -> None:
    config = Config(num_pairs=2, vocab_size=64, validation_examples=50)
    first, second = make(config, seed=0), make(config, seed=5)
    rows: list[set[tuple[int, ...]]] = []
    for source in (first, second):
        validation = source.validation_batches(50, LENGTH)
        rows.append({tuple(row) for batch in validation for row in batch.inputs_BT.tolist()})
    assert rows[0] == rows[1]
    assert len(rows[0]) == 50
    trained = {
        tuple(row)
        for step in range(40)
        for row in first.train_batch(step, 64, LENGTH).inputs_BT.tolist()
    }
    assert not rows[0] & trained


@pytest.mark.parametrize("batch_size", [1, 3, 10, 64])
def test_an_example_does_not_depend_on_its_batch(batch_size: int) -> None:
    source = make(CONFIGS[0])
    whole = next(iter(source.validation_batches(10, LENGTH)))
    parts = list(source.validation_batches(batch_size, LENGTH))
    assert torch.equal(torch.cat([part.inputs_BT for part in parts]), whole.inputs_BT)
    assert torch.equal(torch.cat([part.targets_BT for part in parts]), whole.targets_BT)


def test_bits_are_the_same_everywhere() -> None:
    """Golden: another figure here means that recorded studies cannot be repeated."""
    bits = generator(seed=1, stream=TRAIN, step=2)
    assert [hex(int(word)) for word in np.asarray(bits.random_raw(2))] == [
        "0x451d0dd40544b02e",
        "0xcfe1c8d758c1a838",
    ]
    batch = make(Config(num_pairs=1, vocab_size=16)).train_batch(3, 2, 8)
    assert batch.inputs_BT.tolist() == [[2, 12, 0, 0, 2, 0, 0, 0], [1, 10, 0, 0, 1, 0, 0, 0]]


def test_too_short_a_sequence_names_the_pairs_that_fit() -> None:
    source = make(Config(num_pairs=17))
    with pytest.raises(FieldError, match=r"num_pairs: .*seq_len of 68, not 64: use at most 16"):
        source.train_batch(0, 2, LENGTH)
    with pytest.raises(FieldError, match="num_pairs"):
        list(source.validation_batches(2, LENGTH))
    with pytest.raises(FieldError, match="longer seq_len"):
        source.train_batch(0, 2, 3)


@pytest.mark.parametrize(
    ("values", "field", "advice"),
    [
        ({"num_pairs": 0}, "num_pairs", "at least 1"),
        ({"num_pairs": 8, "vocab_size": 17}, "vocab_size", "at least 18"),
        ({"power": 0.0}, "power", "above 0"),
        ({"validation_examples": 0}, "validation_examples", "at least 1"),
    ],
)
def test_bad_values_name_their_field(values: dict[str, Any], field: str, advice: str) -> None:
    with pytest.raises(FieldError, match=advice) as caught:
        Config(**values)
    assert caught.value.field == field


def test_the_smallest_vocabulary_works() -> None:
    source = make(Config(num_pairs=8, vocab_size=18, validation_examples=3))
    batch = source.train_batch(0, 4, 32)
    assert sorted(batch.inputs_BT[0, 0:16:2].tolist()) == list(range(1, 9))
