"""DataSourceContract: the tests that any data source must pass.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from workbench.data import Batch, DataSource
from workbench.errors import WorkbenchError
from workbench.layout import canonical_json
from workbench.model import IGNORE
from workbench.testing.advice import concerns
from workbench.testing.configs import ConfigContract


class DataSourceContract(ConfigContract):
    """What training and evaluation rely on in a data source.

        class TestMySource(DataSourceContract):
            source = MySource
            configs = [MySource.Config(files="tests/data/*.txt")]

    Class attributes:
        source: the class under test.
        configs: Config instances over small data: the tests read the whole validation part.
        batch_size, length: of the batches.
        run_length, max_shared: at most this share of validation rows may hold, in their middle, a
            run of so many tokens that training rows hold, too. 0 unless the text repeats itself.
    """

    under_test = "source"
    source: ClassVar[type[DataSource]]
    batch_size: ClassVar[int] = 4
    length: ClassVar[int] = 64
    run_length: ClassVar[int] = 48
    max_shared: ClassVar[float] = 0.0

    def make(self, config: Any, folder: Path, *, seed: int = 0) -> DataSource:
        """The source, caching under `folder`."""
        return self.source(config, seed=seed, cache_dir=folder)

    def train(self, source: DataSource, step: int) -> Batch:
        return source.train_batch(step, self.batch_size, self.length)

    def validation(self, source: DataSource) -> list[Batch]:
        return list(source.validation_batches(self.batch_size, self.length))

    @concerns("train_batch", "validation_batches")
    def test_batches_are_tokens(self, config: Any, tmp_path: Path) -> None:
        """int64 ids below `vocab_size`, `[B, T]`, each batch with at least one loss.

        Mend: Return int64 ids below `vocab_size`, inputs `[batch_size, length]` and targets of the
        same shape, in which IGNORE stands where there is no loss.
        """
        source = self.make(config, tmp_path)
        assert source.vocab_size >= 1
        train = self.train(source, 0)
        assert train.inputs_BT.shape == (self.batch_size, self.length)
        validation = self.validation(source)
        assert validation, "the validation part is empty"
        for batch in (train, *validation):
            assert batch.inputs_BT.shape == batch.targets_BT.shape
            assert batch.inputs_BT.shape[1] == self.length
            kept = batch.targets_BT[batch.targets_BT != IGNORE]
            assert len(kept) > 0, "a batch without a loss"
            for tokens in (batch.inputs_BT, kept):
                assert tokens.dtype == torch.int64
                assert tokens.min() >= 0
                assert tokens.max() < source.vocab_size

    @concerns("train_batch", "validation_batches")
    def test_is_deterministic(self, config: Any, tmp_path: Path) -> None:
        """A step's batch depends on seed and step alone, not on history, cache or process.

        Mend: Draw from `torch.Generator().manual_seed(...)` made anew from `self.seed` and `step`
        in every call; keep no position, and read files in sorted order.
        """
        first = self.make(config, tmp_path / "one")
        expected = self.train(first, 3)
        self.train(first, 0)
        others = {
            "after other steps": first,
            "from a full cache": self.make(config, tmp_path / "one"),
            "from an empty cache": self.make(config, tmp_path / "two"),
        }
        for when, source in others.items():
            assert _same(self.train(source, 3), expected), f"train_batch(3) {when}"
            both = zip(self.validation(source), self.validation(first), strict=True)
            assert all(_same(a, b) for a, b in both), f"validation {when}"
            assert source.describe() == first.describe(), f"describe() {when}"

    @concerns("train_batch")
    def test_steps_and_seeds_differ(self, config: Any, tmp_path: Path) -> None:
        """Another step or another seed is another batch.

        Mend: Let both `self.seed` and `step` enter the seed of the generator that draws the batch.
        """
        source = self.make(config, tmp_path)
        expected = self.train(source, 0)
        assert not _same(self.train(source, 1), expected), "steps 0 and 1 are the same batch"
        other = self.make(config, tmp_path, seed=1)
        assert not _same(self.train(other, 0), expected), "seeds 0 and 1 give the same batch"

    @concerns("train_batch", "validation_batches")
    def test_targets_are_the_next_tokens(self, config: Any, tmp_path: Path) -> None:
        """In text, the target of a token is the input after it; elsewhere some carry a loss.

        Mend: Cut `length + 1` tokens: inputs are all but the last, targets all but the first.
        """
        source = self.make(config, tmp_path)
        for batch in (self.train(source, 0), *self.validation(source)):
            assert bool((batch.targets_BT != IGNORE).any()), "no target carries a loss"
            if batch.num_bytes is None:
                continue
            targets_BT = batch.targets_BT[:, :-1]
            kept_BT = targets_BT != IGNORE
            assert torch.equal(targets_BT[kept_BT], batch.inputs_BT[:, 1:][kept_BT])

    @concerns("train_batch", "validation_batches")
    def test_parts_are_disjoint(self, config: Any, tmp_path: Path) -> None:
        """No text is both trained on and judged by; no whole row of a synthetic task is.

        Mend: Split the text (by file, or by line) before cutting it into rows; draw the examples of
        a synthetic task's parts from different seeds or ranges. Text that repeats itself needs
        `max_shared` in the suite of your tests.
        """
        source = self.make(config, tmp_path)
        text = self._is_text(source)
        span = self.run_length if text else self.length
        runs: set[tuple[int, ...]] = set()
        for step in range(64):
            for row in self.train(source, step).inputs_BT.tolist():
                starts = range(self.length - span + 1)
                runs.update(tuple(row[i : i + span]) for i in starts)
        start = (self.length - span) // 2
        rows = [
            tuple(row[start : start + span])
            for batch in self.validation(source)
            for row, targets in zip(batch.inputs_BT.tolist(), batch.targets_BT, strict=True)
            if not text or bool((targets != IGNORE).all())
        ]
        assert rows, "no validation row is full: give the test more data or a lower length"
        shared = sum(row in runs for row in rows) / len(rows)
        assert shared <= self.max_shared, f"{shared:.1%} of validation rows are trained on"

    @concerns("train_batch", "validation_batches")
    def test_num_bytes(self, config: Any, tmp_path: Path) -> None:
        """Bytes are those of the decoded targets, however these are batched.

        Mend: Set `num_bytes` to the UTF-8 bytes of the decoded targets that carry a loss, None in
        every batch of a task that holds no text.
        """
        source = self.make(config, tmp_path)
        totals = []
        for batch_size in (1, self.batch_size):
            batches = source.validation_batches(batch_size, self.length)
            totals.append(sum(batch.num_bytes or 0.0 for batch in batches))
        assert totals[0] == pytest.approx(totals[1])
        if not self._is_text(source):
            assert totals[0] == 0, "a source that holds no text says so in every batch"
            return
        targets = [b.targets_BT[b.targets_BT != IGNORE].tolist() for b in self.validation(source)]
        decoded = source.decode([token for row in targets for token in row])
        # Windows may cut a character in two, hence not to the byte.
        assert totals[0] == pytest.approx(len(decoded.encode()), rel=0.05)

    @concerns("encode", "decode")
    def test_text_goes_both_ways(self, config: Any, tmp_path: Path) -> None:
        """`decode` undoes `encode`; a source without text says so.

        Mend: Let `decode` undo `encode`, with ids below `vocab_size`; a source without text leaves
        both to the base class, which refuses.
        """
        source = self.make(config, tmp_path)
        if self.train(source, 0).num_bytes is None:
            with pytest.raises(WorkbenchError, match="no text"):
                source.encode("of no use here")
        else:
            text = "def f(x): return x"
            tokens = source.encode(text)
            assert source.decode(tokens) == text
            assert all(0 <= token < source.vocab_size for token in tokens)

    @concerns("describe")
    def test_describe_is_plain_data(self, config: Any, tmp_path: Path) -> None:
        """`describe` can be written into a record.

        Mend: Return a dict of strings, numbers and lists that says at least how large the parts
        are.
        """
        facts = self.make(config, tmp_path).describe()
        assert facts, "say at least how large the parts are"
        assert canonical_json(facts)

    def _is_text(self, source: DataSource) -> bool:
        """Whether the tokens stand for text, which every batch must say alike."""
        kinds = {b.num_bytes is None for b in (self.train(source, 0), *self.validation(source))}
        assert len(kinds) == 1, "num_bytes is None for some batches and not for others"
        return kinds == {False}


def _same(first: Batch, second: Batch) -> bool:
    return (
        torch.equal(first.inputs_BT, second.inputs_BT)
        and torch.equal(first.targets_BT, second.targets_BT)
        and first.num_bytes == second.num_bytes
    )
