"""What the load-balance loss does in a training run, and what it leaves alone.

Shape suffixes: B batch, T tokens, N = B·T.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from workbench.builder import Builder
from workbench.config import NoConfig
from workbench.layout import Block, Layout
from workbench.model import HybridLM
from workbench.testing.toys import ToyText
from workbench.training import TrainingConfig, train

CONFIG = TrainingConfig(tokens=20_480, batch_size=4, seq_len=64, lr=0.01, checkpoint_seconds=0)
EXPERTS = 8


@pytest.fixture
def data(tmp_path: Path) -> ToyText:
    return ToyText(NoConfig(), seed=0, cache_dir=tmp_path)


def make_model(builder: Builder, aux_loss_weight: float) -> HybridLM:
    config = {
        "num_experts": EXPERTS,
        "top_k": 2,
        "intermediate_size": 16,
        "aux_loss_weight": aux_loss_weight,
    }
    attention = Block(layer="attention", config={"num_heads": 2})
    blocks = (attention, Block(layer="moe", config=config))
    return builder.build(Layout(d_model=32, vocab_size=256, blocks=blocks), seed=1)


@torch.no_grad()
def usage_entropy(model: HybridLM, data: ToyText) -> float:
    """Entropy in nats of how often each expert is chosen on the validation text."""
    counts = torch.zeros(EXPERTS)

    def count(_: object, __: object, logits_NE: Tensor) -> None:
        counts.add_(torch.bincount(logits_NE.topk(2).indices.flatten(), minlength=EXPERTS))

    hook = model.layers[1].router.register_forward_hook(count)
    for batch in data.validation_batches(4, 64):
        model(batch.inputs_BT)
    hook.remove()
    shares = counts / counts.sum()
    return float(-torch.xlogy(shares, shares).sum())


def test_the_loss_balances_the_load(builder_with_moe: Builder, data: ToyText) -> None:
    entropies, losses = {}, {}
    for weight in (0.0, 0.05):
        model = make_model(builder_with_moe, weight)
        losses[weight] = [point["loss"] for point in train(model, data, CONFIG).curve]
        entropies[weight] = usage_entropy(model, data)
    assert entropies[0.05] > entropies[0.0] + 0.1
    assert entropies[0.05] > 0.95 * math.log(EXPERTS)
    assert all(curve[-1] < curve[0] - 1 for curve in losses.values())


def test_the_recorded_loss_is_the_cross_entropy_alone(
    builder_with_moe: Builder, data: ToyText
) -> None:
    two_steps = dataclasses.replace(CONFIG, tokens=512)
    batch = data.train_batch(0, 4, 64)
    curves = []
    for weight in (0.0, 5.0):
        model = make_model(builder_with_moe, weight)
        expected = float(model.loss(batch.inputs_BT, batch.targets_BT).detach())
        curves.append([point["loss"] for point in train(model, data, two_steps).curve])
        assert curves[-1][0] == pytest.approx(expected, rel=1e-6)
    (first, second), (first_with_aux, second_with_aux) = curves
    assert first == first_with_aux
    assert second != second_with_aux, "the load-balance loss was not trained on"
