"""Recall beside perplexity: what a layout learns of MQAR in a small training of its own.

Pure recurrent models fall behind attention on looking things up long before their perplexity shows
it, and most of that gap is associative recall (Arora et al., 2023, arXiv:2312.04927). A study on
text can have both: this metric trains a fresh model of the trial's layout on the synthetic task,
before the full training, and leaves the trial's own model alone.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar

from workbench.metric import Metric, Subject
from workbench.synthetic import learn
from workbench.training_config import TrainingConfig
from workbench_data.mqar import Config as TaskConfig
from workbench_data.mqar import MultiQueryRecall
from workbench_metrics.config import Sizes

EXAMPLES = 256  # judged sequences


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall(Sizes):
    """The task, and how long it is practised."""

    tokens: Annotated[int, "Training tokens of the task"] = 65_536
    batch_size: Annotated[int, "Sequences a step"] = 64
    seq_len: Annotated[int, "Tokens a sequence, at least 4 times num_pairs"] = 16
    num_pairs: Annotated[int, "Key-value pairs a sequence, each asked for once"] = 4
    vocab_size: Annotated[int, "Tokens of the task, half of them keys, half values"] = 16
    lr: Annotated[float, "Peak learning rate"] = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.training
        self.task(0).train_batch(0, 1, self.seq_len)  # refuses what does not fit

    @property
    def training(self) -> TrainingConfig:
        """Without weight decay: what is looked for is whether it can be learned, and soon."""
        return TrainingConfig(
            tokens=self.tokens,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            lr=self.lr,
            weight_decay=0.0,
        )

    def task(self, seed: int) -> MultiQueryRecall:
        """The data source, which makes its sequences and keeps no files."""
        config = TaskConfig(
            vocab_size=self.vocab_size, num_pairs=self.num_pairs, validation_examples=EXAMPLES
        )
        return MultiQueryRecall(config, seed=seed, cache_dir=Path())


class MultiQueryRecallShare(Metric):
    """Share of MQAR's queries that the most likely token answers right, after a small training.

    Weights and sequences are of the study's seed. The loss, in nats a query, is left beside it.
    """

    Config: ClassVar[type] = Recall
    unit = "share"
    direction = "maximize"
    stage = "synthetic"
    label = "Recall (MQAR), learned in a small training of its own"

    def measure(self, subject: Subject) -> float:
        found = learn(subject, self.config.task(subject.seed), self.config.training)
        subject.extras["loss"] = found.loss
        return found.accuracy
