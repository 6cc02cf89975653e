"""Recurrent states that are kept narrower than they are computed in."""

from __future__ import annotations

import pytest
import torch

from workbench import Block, Layout
from workbench.builder import Builder
from workbench.decoding import set_state_dtype, why_not_static

STEPS = 256


@pytest.fixture
def model():
    blocks = (
        Block(layer="mamba2", config={"headdim": 32, "d_state": 32}),
        Block(layer="attention", config={"num_heads": 2, "num_kv_heads": 1}),
    ) * 2
    layout = Layout(d_model=64, vocab_size=97, blocks=blocks)
    return Builder.load().build(layout, seed=0).eval()


def held(states):
    return [state.ssm_BHPN.dtype for state in states if hasattr(state, "ssm_BHPN")]


def test_states_are_float32_unless_asked_for(model):
    assert held(model.init_state(1, 8, dtype=torch.bfloat16)) == [torch.float32] * 2
    assert set_state_dtype(model, torch.bfloat16) == 2
    states = model.init_state(1, 8)
    assert held(states) == [torch.bfloat16] * 2
    assert states[0].conv_BCW.dtype == torch.float32
    assert states[1].keys_BHLP.dtype == torch.float32
    assert why_not_static(model, states) == ""
    assert set_state_dtype(model, None) == 2
    assert held(model.init_state(1, 8)) == [torch.float32] * 2


@torch.inference_mode()
def test_half_as_wide_states_drift_little(model):
    """Rounding at each token must not add up: old roundings decay with the state."""
    tokens = torch.randint(97, (2, 32 + STEPS), generator=torch.Generator().manual_seed(0))
    results = {}
    for dtype in (None, torch.bfloat16):
        set_state_dtype(model, dtype)
        states = model.init_state(2, 32 + STEPS)
        model.prefill(tokens[:, :32], states)
        logits = [model.step(tokens[:, i], states) for i in range(32, 32 + STEPS)]
        results[dtype] = torch.stack(logits)
    wanted, found = results[None], results[torch.bfloat16]
    drift = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    print(f"drift: first {drift[:8].mean():.2e}, last {drift[-8:].mean():.2e}, {drift.max():.2e}")
    assert 0 < drift.max() < 2e-2
    assert drift[-64:].mean() < 3 * drift[:64].mean()
