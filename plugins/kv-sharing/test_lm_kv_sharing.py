"""The workbench's contract suite on the layer of this package, and what is its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lm_kv_sharing import KVSharingAttention, KVSharingConfig
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from workbench.builder import Builder
from workbench.errors import FieldError
from workbench.layer import Context
from workbench.layout import Block, Layout
from workbench.testing import LayerContract
from workbench_attention.attention import Attention

HEADS = {"num_heads": 4, "num_kv_heads": 2}


class TestKVSharing(LayerContract):
    layer = KVSharingAttention
    captured = True
    configs = (
        KVSharingConfig(num_heads=4),
        KVSharingConfig(num_heads=4, num_kv_heads=2, position="alibi"),
        KVSharingConfig(num_heads=2, num_kv_heads=1, head_dim=8, partial_rotary_factor=0.5),
        KVSharingConfig(num_heads=4, position="none", sliding_window=5),
    )

    def earlier(self, config):
        return [("attention", Attention, config.attention())]


@pytest.fixture(scope="module")
def builder() -> Builder:
    return Builder.load([Path(__file__).parent])


def layout_of(*blocks: tuple[str, dict[str, object]]) -> Layout:
    return Layout(
        d_model=32,
        vocab_size=64,
        blocks=tuple(Block(layer=name, config=config) for name, config in blocks),
    )


@torch.no_grad()
def test_it_is_transformers_attention_to_the_other_blocks_keys(builder: Builder) -> None:
    layout = layout_of(
        ("attention", HEADS), ("attention", HEADS), ("swiglu", {}), ("kv-sharing-attention", HEADS)
    )
    model = builder.build(layout)
    inputs: dict[int, Tensor] = {}
    for index in (1, 3):

        def keep(module, arguments, index=index):
            inputs[index] = arguments[0]

        model.layers[index].register_forward_pre_hook(keep)
    outputs = []
    model.layers[3].register_forward_hook(lambda module, arguments, output: outputs.append(output))
    model(torch.arange(22).view(2, 11))
    read, reader = model.layers[1], model.layers[3]
    split = (2, 11, -1, 8)
    q_BHTP = reader.q_proj(inputs[3]).view(split).transpose(1, 2)
    k_BKTP = read.k_proj(inputs[1]).view(split).transpose(1, 2)
    v_BKTP = read.v_proj(inputs[1]).view(split).transpose(1, 2)
    rotary = LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    )
    tables = rotary(q_BHTP, torch.arange(11)[None])
    q_BHTP, k_BKTP = apply_rotary_pos_emb(q_BHTP, k_BKTP, *tables)
    reader.num_key_value_groups = 2
    mask_TS = torch.full((11, 11), -torch.inf).triu(1)
    y_BTHP, _ = eager_attention_forward(
        reader.eval(), q_BHTP, k_BKTP, v_BKTP, mask_TS[None, None], scaling=8**-0.5
    )
    torch.testing.assert_close(outputs[0], reader.o_proj(y_BTHP.flatten(2)))


def test_it_saves_the_cache_and_the_projections(builder: Builder) -> None:
    both = layout_of(("attention", HEADS), ("attention", HEADS))
    shared = layout_of(("attention", HEADS), ("kv-sharing-attention", HEADS))
    whole, less = (builder.costs(layout, length=100).total for layout in (both, shared))
    assert less.state_bytes * 2 == whole.state_bytes
    assert less.decode_state_bytes == whole.decode_state_bytes
    assert whole.parameters - less.parameters == 2 * 32 * 16
    assert whole.decode_flops - less.decode_flops == 2 * 2 * 32 * 16
    assert builder.build(shared).num_parameters == less.parameters
    states = builder.build(shared).init_state(3, 100)
    assert sum(state.num_bytes for state in states) == 3 * less.state_bytes


@pytest.mark.parametrize(
    ("below", "config", "message"),
    [
        ([], HEADS, "reads an earlier 'attention' block: place one below it"),
        ([("mamba", {})], HEADS, "place one below it"),
        ([("attention", {"num_heads": 2})], {"num_heads": 4}, "head_dim.*is 8, but block 0.*16"),
        ([("attention", HEADS)], {"num_heads": 4}, "num_kv_heads.*is 4, but block 0.*has 2"),
        ([("attention", {**HEADS, "position": "none"})], HEADS, "position.*is rope.*has none"),
        ([("attention", {**HEADS, "sliding_window": 5})], HEADS, "sliding_window.*has 5: set both"),
    ],
)
def test_what_cannot_be_read_is_refused(builder: Builder, below, config, message: str) -> None:
    with pytest.raises(FieldError, match=message):
        builder.resolve(layout_of(*below, ("kv-sharing-attention", config)))


def test_it_does_not_run_alone() -> None:
    layer = KVSharingAttention(32, KVSharingConfig(num_heads=4))
    with pytest.raises(ValueError, match=r"needs Context\.source"):
        layer(torch.zeros(1, 3, 32), Context())
