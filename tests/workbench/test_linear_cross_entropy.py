"""The chunked loss is torch's, in value and gradients, for any chunk."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from workbench import linear_cross_entropy as module
from workbench.linear_cross_entropy import linear_cross_entropy

torch.set_num_threads(1)


def arguments(tokens=37, width=8, vocab=29, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, width, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    return hidden, weight, targets


@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 100])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scaling", [1.0, 7.0])
def test_value_and_gradients_are_torchs(chunk, reduction, scaling):
    hidden, weight, targets = arguments(dtype=torch.float32)
    targets[::4] = -100
    wanted = F.cross_entropy(hidden @ weight.t() / scaling, targets, reduction=reduction)
    found = linear_cross_entropy(
        hidden, weight, targets, scaling=scaling, reduction=reduction, chunk=chunk
    )
    torch.testing.assert_close(found, wanted)
    for one, other in zip(
        torch.autograd.grad(found * 3, (hidden, weight)),
        torch.autograd.grad(wanted * 3, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_autocast_decides_the_products_dtype_and_not_the_gradients():
    hidden, weight, targets = arguments(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32
    loss.backward()
    assert weight.grad.dtype == hidden.grad.dtype == torch.float32
    wanted = F.cross_entropy(hidden @ weight.t(), targets)
    torch.testing.assert_close(loss, wanted, rtol=3e-2, atol=0)


def test_without_gradients_none_are_computed():
    hidden, weight, targets = arguments(dtype=torch.float32)
    with torch.no_grad():
        found = linear_cross_entropy(hidden, weight, targets, chunk=5)
    assert not found.requires_grad
    torch.testing.assert_close(found, F.cross_entropy(hidden @ weight.t(), targets).detach())


@pytest.mark.parametrize("wanted", [True, False])
def test_a_kernel_that_leaves_gradients_in_place_of_logits_serves(monkeypatch, wanted):
    calls = []

    def in_place(logits, targets, scaling, ignore_index, gradients):
        scores = logits / scaling
        losses = F.cross_entropy(scores, targets, reduction="none", ignore_index=ignore_index)
        if gradients:
            chosen = F.one_hot(targets.clamp_min(0), logits.shape[1])
            slopes = (scores.softmax(-1) - chosen) / scaling
            logits.copy_(slopes * (targets != ignore_index)[:, None])
        calls.append(gradients)
        return losses

    stand_in = SimpleNamespace(cross_entropy=in_place)
    monkeypatch.setitem(sys.modules, "workbench.triton_cross_entropy", stand_in)
    monkeypatch.setattr(module, "cross_entropy_backend", lambda _: "triton")
    hidden, weight, targets = arguments(dtype=torch.float32)
    targets[::4] = -100
    wanted_loss = F.cross_entropy(hidden @ weight.t() / 7, targets)
    with torch.set_grad_enabled(wanted):
        found = linear_cross_entropy(hidden, weight, targets, scaling=7.0, chunk=5)
    torch.testing.assert_close(found, wanted_loss, check_stride=False)
    assert calls == [wanted] * 8
    if wanted:
        for one, other in zip(
            torch.autograd.grad(found, (hidden, weight)),
            torch.autograd.grad(wanted_loss, (hidden, weight)),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="'none'"):
        linear_cross_entropy(*arguments(), reduction="none")
