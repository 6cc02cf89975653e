"""Recall in a small training of its own: what is counted, that it repeats, and what it tells."""

from __future__ import annotations

import dataclasses
import random
import re
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from workbench import config as configs
from workbench.builder import Builder
from workbench.errors import FieldError
from workbench.layout import Block, Layout, Named
from workbench.metric import Subject
from workbench.testing import MetricContract
from workbench.training import train
from workbench.training_config import TrainingConfig
from workbench_metrics.recall import EXAMPLES, MultiQueryRecallShare, Recall

STUDIES = Path(__file__).parents[2] / "docs" / "studies.md"
SHORT = Recall(tokens=4096)
ATTENTION = Block(layer="attention", config={"head_dim": 16})
SMALL_STATE = Block(layer="mamba2", config={"headdim": 16, "d_state": 4})
MLP = Block(layer="swiglu")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class TestRecall(MetricContract):
    metric = MultiQueryRecallShare
    configs = (SHORT, Recall(tokens=160, seq_len=8, num_pairs=2, vocab_size=7, batch_size=3))


def subject(builder: Builder, *blocks: Block, d_model: int = 32, **parts: Any) -> Subject:
    layout = builder.resolve(Layout(d_model=d_model, vocab_size=256, blocks=blocks))
    return Subject(layout=layout, builder=builder, **parts)


def recall(config: Recall, of: Subject) -> tuple[float, float]:
    """The share, and the loss beside it."""
    of.extras = {}
    return MultiQueryRecallShare(config).measure(of), of.extras["loss"]


def test_it_is_the_share_of_queries_answered_right_after_training(builder: Builder) -> None:
    """Trained here, and counted query by query."""
    config = dataclasses.replace(SHORT, lr=0.01)
    found, loss = recall(config, subject(builder, ATTENTION, MLP, seed=3))
    layout = Layout(d_model=32, vocab_size=config.vocab_size, blocks=(ATTENTION, MLP))
    model = builder.build(layout, seed=3)
    task = config.task(3)
    training = TrainingConfig(
        tokens=4096, batch_size=config.batch_size, seq_len=config.seq_len, lr=0.01, weight_decay=0
    )
    train(model, task, training)
    right, lost = [], []
    for batch in task.validation_batches(1, config.seq_len):
        scores_TV = model(batch.inputs_BT)[0].detach()
        for at, target in enumerate(batch.targets_BT[0].tolist()):
            if target >= 0:
                right.append(int(scores_TV[at].argmax()) == target)
                lost.append(-float(scores_TV[at].log_softmax(-1)[target]))
    assert len(right) == EXAMPLES * config.num_pairs
    assert found == sum(right) / len(right)
    assert loss == pytest.approx(sum(lost) / len(lost), rel=1e-5)


def test_it_repeats_itself_and_leaves_all_generators_alone(builder: Builder) -> None:
    of = subject(builder, ATTENTION)
    first = recall(SHORT, of)
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert recall(SHORT, of) == first
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert before == after
    assert recall(SHORT, dataclasses.replace(of, seed=1)) != first


def test_only_what_it_trains_counts(builder: Builder) -> None:
    """The layout's own vocabulary and quantizers change nothing, and all else of it does."""
    of = subject(builder, ATTENTION)
    first = recall(SHORT, of)
    quantized = dataclasses.replace(ATTENTION, quantizer=Named(name="int8"))
    other = of.layout.replace(vocab_size=999, blocks=(quantized,))
    assert recall(SHORT, dataclasses.replace(of, layout=builder.resolve(other))) == first
    untied = builder.resolve(of.layout.replace(tie_embeddings=False))
    assert recall(SHORT, dataclasses.replace(of, layout=untied)) != first


def test_it_runs_in_the_studys_precision(builder: Builder) -> None:
    study = TrainingConfig(tokens=10**6, precision="bfloat16", lr=1e-9)
    of = subject(builder, ATTENTION)
    full = recall(SHORT, of)
    half = recall(SHORT, dataclasses.replace(of, training=study))
    assert half != full
    assert half[1] == pytest.approx(full[1], rel=0.05)  # and by its own learning rate


@pytest.mark.parametrize(
    ("blocks", "low", "high"),
    [
        ((SMALL_STATE, ATTENTION), 0.9, 1.0),
        ((SMALL_STATE, SMALL_STATE), 0.0, 0.5),
        pytest.param((ATTENTION, MLP, ATTENTION, MLP), 0.9, 1.0, marks=pytest.mark.slow),
    ],
    ids=["hybrid", "recurrent", "attention"],
)
def test_attention_recalls_and_a_small_state_does_not(
    builder: Builder, blocks: tuple[Block, ...], low: float, high: float
) -> None:
    """At the defaults, at equal depth and width."""
    assert low <= recall(Recall(), subject(builder, *blocks, d_model=64))[0] <= high


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"tokens": 0}, "tokens"),
        ({"tokens": 100}, "tokens"),
        ({"lr": 0}, "lr"),
        ({"num_pairs": 5}, "num_pairs"),
        ({"vocab_size": 9}, "vocab_size"),
        ({"batch_size": -1}, "batch_size"),
    ],
)
def test_nonsense_is_refused_with_its_field(config: dict[str, Any], field: str) -> None:
    with pytest.raises(FieldError) as error:
        configs.from_dict(Recall, config)
    assert error.value.field == field


def test_the_documents_give_the_defaults(builder: Builder) -> None:
    section = STUDIES.read_text().partition("## Recall beside perplexity")[2]
    lines = re.search(r"(?:^(?: {4}.*)?\n)+", section.partition("both:\n")[2], re.M)
    study = tomllib.loads(textwrap.dedent(lines[0]))  # type: ignore[index]
    assert configs.from_dict(Recall, study["metrics"]["mqar_recall"]) == Recall()
    assert {*study["objectives"], *study["constraints"]} <= set(builder.metrics)
