"""DataSourceContract passes on honest sources, and each of its tests finds its fault."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Annotated

import pytest
import torch

from tests.workbench.testing.running import failure, suite_tests
from workbench.config import Choice, NoConfig
from workbench.data import DataSource
from workbench.model import IGNORE
from workbench.testing import DataSourceContract
from workbench.testing.toys import ToyText


class TestToyText(DataSourceContract):
    source = ToyText
    configs = (NoConfig(),)


class Recall(ToyText):
    """A synthetic task: targets are no text."""

    def train_batch(self, step, batch_size, length):
        batch = super().train_batch(step, batch_size, length)
        return dataclasses.replace(batch, targets_BT=batch.inputs_BT, num_bytes=None)

    def validation_batches(self, batch_size, length):
        for batch in super().validation_batches(batch_size, length):
            yield dataclasses.replace(batch, targets_BT=batch.inputs_BT, num_bytes=None)

    def encode(self, text):
        raise self._no_text()


class TestRecall(DataSourceContract):
    source = Recall
    configs = (NoConfig(),)


class SmallVocabulary(ToyText):
    vocab_size = 100


class Int32(ToyText):
    def train_batch(self, step, batch_size, length):
        batch = super().train_batch(step, batch_size, length)
        return dataclasses.replace(batch, inputs_BT=batch.inputs_BT.int())


class NothingToLearn(ToyText):
    def train_batch(self, step, batch_size, length):
        batch = super().train_batch(step, batch_size, length)
        nothing_BT = torch.full_like(batch.targets_BT, IGNORE)
        return dataclasses.replace(batch, targets_BT=nothing_BT)


class NothingToJudge(ToyText):
    def validation_batches(self, batch_size, length):
        return iter(())


class Remembers(ToyText):
    """Goes on from where it was instead of looking the step up."""

    calls = 0

    def train_batch(self, step, batch_size, length):
        self.calls += 1
        return super().train_batch(self.calls, batch_size, length)


class DependsOnItsCache(ToyText):
    def __init__(self, config, *, seed=0, cache_dir):
        super().__init__(config, seed=seed, cache_dir=cache_dir)
        if cache_dir.exists():
            self.parts["train"] = self.parts["train"].flip(0)
        cache_dir.mkdir(exist_ok=True)


class ShufflesValidation(ToyText):
    dice = random.Random(0)

    def validation_batches(self, batch_size, length):
        batches = list(super().validation_batches(batch_size, length))
        return iter(self.dice.sample(batches, len(batches)))


class IgnoresItsSeed(ToyText):
    def __init__(self, config, *, seed=0, cache_dir):
        super().__init__(config, seed=0, cache_dir=cache_dir)


class OneBatch(ToyText):
    def train_batch(self, step, batch_size, length):
        return super().train_batch(0, batch_size, length)


class PredictsTheInput(ToyText):
    def train_batch(self, step, batch_size, length):
        batch = super().train_batch(step, batch_size, length)
        return dataclasses.replace(batch, targets_BT=batch.inputs_BT)


class Leaks(ToyText):
    def __init__(self, config, *, seed=0, cache_dir):
        super().__init__(config, seed=seed, cache_dir=cache_dir)
        self.parts["validation"] = torch.cat([self.parts["validation"], self.parts["train"][:500]])


class CountsWholeBatches(ToyText):
    def validation_batches(self, batch_size, length):
        for batch in super().validation_batches(batch_size, length):
            yield dataclasses.replace(batch, num_bytes=float(batch_size * length))


class CountsBits(ToyText):
    def validation_batches(self, batch_size, length):
        for batch in super().validation_batches(batch_size, length):
            yield dataclasses.replace(batch, num_bytes=8 * batch.num_bytes)


class Reverses(ToyText):
    def decode(self, tokens):
        return super().decode(tokens)[::-1]


class PretendsToHoldText(Recall):
    def encode(self, text):
        return []


class DescribesItselfInObjects(ToyText):
    def describe(self):
        return {"parts": set(self.parts)}


class OnceOnly(ToyText):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        share: Annotated[float, Choice(0.5)] = math.nan


FAULTS: list[tuple[type[DataSource], str]] = [
    (SmallVocabulary, "test_batches_are_tokens"),
    (Int32, "test_batches_are_tokens"),
    (NothingToLearn, "test_batches_are_tokens"),
    (NothingToJudge, "test_batches_are_tokens"),
    (Remembers, "test_is_deterministic"),
    (DependsOnItsCache, "test_is_deterministic"),
    (ShufflesValidation, "test_is_deterministic"),
    (IgnoresItsSeed, "test_steps_and_seeds_differ"),
    (OneBatch, "test_steps_and_seeds_differ"),
    (PredictsTheInput, "test_targets_are_the_next_tokens"),
    (Leaks, "test_parts_are_disjoint"),
    (CountsWholeBatches, "test_num_bytes"),
    (CountsBits, "test_num_bytes"),
    (Reverses, "test_text_goes_both_ways"),
    (PretendsToHoldText, "test_text_goes_both_ways"),
    (DescribesItselfInObjects, "test_describe_is_plain_data"),
    (OnceOnly, "test_config_is_plain_data"),
]

RAISES = {
    "test_config_is_plain_data": "ValueError",
    "test_describe_is_plain_data": "TypeError",
    "test_text_goes_both_ways": ("AssertionError", "Failed: DID NOT RAISE"),
}


@pytest.mark.parametrize(
    ("source", "test"), FAULTS, ids=[f"{thing.__name__}-{test[5:]}" for thing, test in FAULTS]
)
def test_each_fault_is_found(source: type[DataSource], test: str, tmp_path: Path) -> None:
    message = failure(DataSourceContract, test, tmp_path, source=source, configs=(source.Config(),))
    assert message.startswith(RAISES.get(test, "AssertionError"))


def test_every_test_of_the_suite_has_a_fault() -> None:
    assert suite_tests(DataSourceContract) == {test for _, test in FAULTS}
