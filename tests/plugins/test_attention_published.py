"""What attention publishes is all that its queries attended to: its output follows from it.

Shape suffixes: B batch, T tokens in this call, D d_model, H query heads, K key-value heads,
P head dim, S keys.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.layer import PLAIN, Context
from workbench_attention.attention import Attention
from workbench_attention.config import AttentionConfig

D_MODEL, HEADS, KV_HEADS, HEAD_DIM = 32, 4, 2, 8
BATCH, LENGTH = 2, 11
VARIANTS: dict[str, dict[str, Any]] = {
    "rope": {"partial_rotary_factor": 0.5},
    "none": {"position": "none", "qk_norm": True},
    "alibi": {"position": "alibi", "scale": 0.5},
    "window": {"sliding_window": 4},
    "alibi window": {"position": "alibi", "sliding_window": 4},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def layer_of(variant: str) -> Attention:
    config = AttentionConfig(num_heads=HEADS, num_kv_heads=KV_HEADS, **VARIANTS[variant])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = Attention(D_MODEL, config, dtype=torch.float64)
        layer.reset_parameters()
    return layer


def inputs(length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(BATCH, length, D_MODEL, dtype=torch.float64, generator=generator)


def contexts() -> dict[str, Context]:
    mask_BT = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask_BT[0, :3] = False
    documents_BT = torch.tensor([[0] * 4 + [1] * 7, [0] * 9 + [1] * 2], dtype=torch.int32)
    return {
        "plain": PLAIN,
        "padding": Context(attention_mask_BT=mask_BT),
        "documents": Context(seq_idx_BT=documents_BT),
        "prefix": Context(prefix_lengths_B=torch.tensor([5, 2])),
    }


def publishing(context: Context = PLAIN) -> Context:
    return dataclasses.replace(context, published={})


def attended(layer: Attention, x_BTD: Tensor, context: Context, start: int = 0) -> Tensor:
    """The layer's output from its own queries and what it published."""
    published = context.published
    assert published is not None
    keys, values, mask = published["keys"], published["values"], published["mask"]
    assert keys is not None
    assert values is not None
    length, seen = x_BTD.shape[1], keys.shape[2]
    assert keys.shape == values.shape == (BATCH, KV_HEADS, seen, HEAD_DIM)
    if mask is not None:
        assert mask.shape[0] in (1, BATCH)
        assert mask.shape[1] in (1, HEADS)
        assert mask.shape[2:] == (length, seen)
    queries_BHTP, _, _ = layer._project(x_BTD, start)
    y_BHTP = F.scaled_dot_product_attention(
        queries_BHTP, keys, values, mask,
        is_causal=mask is None and length > 1, scale=layer.scale, enable_gqa=True,
    )  # fmt: skip
    output_BTD: Tensor = layer.o_proj(y_BHTP.transpose(1, 2).flatten(2))
    return output_BTD


@pytest.mark.parametrize("call", contexts())
@each_variant
def test_a_whole_sequence(variant: str, call: str) -> None:
    layer, context = layer_of(variant), publishing(contexts()[call])
    output_BTD = layer(inputs(), context)
    torch.testing.assert_close(attended(layer, inputs(), context), output_BTD)


@pytest.mark.parametrize("call", ["plain", "padding", "documents"])
@each_variant
@torch.no_grad()
def test_a_call_that_continues_and_the_steps_after_it(variant: str, call: str) -> None:
    layer, first = layer_of(variant), contexts()[call]
    state = layer.init_state(BATCH, 3 * LENGTH)
    layer(inputs(), first, state)
    second = publishing(Context(seq_idx_BT=_continued(first)))
    more_BTD = inputs(5)
    output_BTD = layer(more_BTD, second, state)
    torch.testing.assert_close(attended(layer, more_BTD, second, LENGTH), output_BTD)
    for offset in range(6):
        token_B1D = inputs(20 + offset)[:, :1]
        context = publishing()
        output_BD = layer.step(token_B1D[:, 0], state, context)
        expected_B1D = attended(layer, token_B1D, context, LENGTH + 5 + offset)
        torch.testing.assert_close(expected_B1D[:, 0], output_BD)


def _continued(context: Context) -> Tensor | None:
    """Documents of a second call, which begins in the last one of the first."""
    if context.seq_idx_BT is None:
        return None
    return context.seq_idx_BT[:, -1:] + torch.tensor([0, 0, 0, 1, 1], dtype=torch.int32)


def test_no_mask_says_all_that_causality_leaves() -> None:
    layer = layer_of("rope")
    context = publishing()
    layer(inputs(), context)
    assert context.published is not None
    assert context.published["mask"] is None
    state = layer.init_state(BATCH, LENGTH)
    layer.step(inputs()[:, 0], state, context)
    assert context.published["mask"] is None


def test_gradients_reach_the_published_keys_and_values() -> None:
    layer, context = layer_of("rope"), publishing()
    layer(inputs(), context)
    assert context.published is not None
    keys, values = context.published["keys"], context.published["values"]
    assert keys is not None
    assert values is not None
    (keys.square().sum() + values.square().sum()).backward()
    for projection in (layer.k_proj, layer.v_proj):
        assert projection.weight.grad is not None
        assert projection.weight.grad.abs().max() > 0


def test_nothing_is_kept_where_nobody_reads() -> None:
    context = dataclasses.replace(PLAIN)
    layer_of("rope")(inputs(), context)
    assert context.published is None
