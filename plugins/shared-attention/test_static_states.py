"""Steps that a CUDA graph could replay: on tensors at fixed places they decode as ever."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from workbench.builder import Builder
from workbench.decoding import Places, why_not_static
from workbench.layer import Context
from workbench.layout import Block, Layout

HEADS = {"num_heads": 4, "adapter_rank": 4}
CASES = [
    [("shared-attention", {**HEADS, "attention_adapter": adapter})] * 2 for adapter in (False, True)
] + [[("zamba2", {**HEADS, "headdim": 16, "d_state": 8})] * 2]


@pytest.fixture(scope="module")
def builder() -> Builder:
    return Builder.load([Path(__file__).parent])


@pytest.mark.parametrize("blocks", CASES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("prompt", [3, 12])
@torch.inference_mode()
def test_static_steps_are_steps(builder: Builder, blocks, padded: bool, prompt: int) -> None:
    layout = Layout(
        d_model=32,
        vocab_size=31,
        blocks=tuple(Block(layer=name, config=config) for name, config in blocks),
    )
    model = builder.build(layout, seed=0).eval()
    tokens = torch.randint(31, (2, prompt + 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, prompt, dtype=torch.bool)
    mask[1, 0] = False
    plain = model.init_state(2, prompt + 10)
    model.prefill(
        tokens[:, :prompt], plain, Context(attention_mask_BT=mask) if padded else Context()
    )
    assert why_not_static(model, plain) == ""
    static, before = copy.deepcopy(plain), copy.deepcopy(plain)
    for state in static:
        state.make_static()
    places = Places(static)
    steps = range(prompt, prompt + 10)
    wanted = [model.step(tokens[:, i], plain) for i in steps]
    for _ in range(2):  # and again, from where they began
        for index, expected in zip(steps, wanted, strict=True):
            found = model.step(tokens[:, index], static)
            places.take_back()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for state, earlier in zip(static, before, strict=True):
            state.restore(earlier)
