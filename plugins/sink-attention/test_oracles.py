"""The layer against attention that we did not write, with the same weights, and exact counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lm_sink_attention import SinkAttention
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import GptOssConfig, LlamaConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from workbench.builder import Builder
from workbench.layer import Context
from workbench.layout import Block, Layout

D_MODEL, HEADS, KV_HEADS, HEAD_DIM = 32, 4, 2, 8
SINKS, WINDOW, LENGTH = 3, 5, 29
TOLERANCE = 1e-12
ROUNDING = 2e-5  # transformers computes RoPE's tables in float32; outputs are about 10
SHAPE = {
    "hidden_size": D_MODEL,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "num_hidden_layers": 1,
    "attn_implementation": "eager",
}


def make(**changes: object) -> SinkAttention:
    """The layer in float64 with random weights."""
    values = {
        "num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "num_sinks": SINKS, "window": WINDOW, **changes,
    }  # fmt: skip
    torch.manual_seed(0)
    layer = SinkAttention(D_MODEL, SinkAttention.Config(**values), dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.4)
    return layer


def inputs(length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, length, D_MODEL, dtype=torch.float64, generator=generator)


def additive_mask(length: int, num_sinks: int, window: int) -> Tensor:
    """`[1, 1, T, T]`: 0 where seen; written out pair by pair."""
    mask = torch.full((1, 1, length, length), -torch.inf, dtype=torch.float64)
    for query in range(length):
        for key in range(query + 1):
            if key < num_sinks or query - key < window:
                mask[..., query, key] = 0.0
    return mask


def llama(layer: SinkAttention, x_BTD: Tensor, mask: Tensor) -> Tensor:
    """Transformers' Llama attention on positions 0, 1, …"""
    config = LlamaConfig(**SHAPE)
    attention = LlamaAttention(config, layer_idx=0).double()
    attention.load_state_dict(layer.state_dict())
    tables = LlamaRotaryEmbedding(config)(x_BTD, torch.arange(x_BTD.shape[1])[None])
    output: Tensor = attention(x_BTD, tables, mask)[0]
    return output


@torch.no_grad()
def test_equals_llama_with_an_explicit_mask() -> None:
    layer, x_BTD = make(position="text"), inputs()
    expected_BTD = llama(layer, x_BTD, additive_mask(LENGTH, SINKS, WINDOW))
    torch.testing.assert_close(layer(x_BTD), expected_BTD, rtol=0, atol=ROUNDING)


@torch.no_grad()
def test_cache_positions_equal_llama_on_what_the_cache_holds() -> None:
    """StreamingLLM: each query attends to the kept tokens as if nothing had been between them."""
    layer, x_BTD = make(), inputs()
    actual_BTD, text_BTD = layer(x_BTD), make(position="text")(x_BTD)
    differs = 0.0
    for query in range(LENGTH):
        kept = [key for key in range(query + 1) if key < SINKS or query - key < WINDOW]
        everything = additive_mask(len(kept), 0, len(kept))
        expected_BD = llama(layer, x_BTD[:, kept], everything)[:, -1]
        torch.testing.assert_close(actual_BTD[:, query], expected_BD, rtol=0, atol=ROUNDING)
        differs = max(differs, float((text_BTD[:, query] - expected_BD).abs().max()))
    assert differs > 1e-3, "both positions give the same: the test shows nothing"


@torch.no_grad()
@pytest.mark.parametrize("num_sinks", [0, SINKS])
def test_sink_logits_equal_gpt_oss(num_sinks: int) -> None:
    layer, x_BTD = make(position="text", num_sinks=num_sinks, sink_logits=True), inputs()
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = GptOssConfig(**SHAPE, attention_bias=False, rope_parameters=rope)
    attention = GptOssAttention(config, layer_idx=0).double()
    attention.load_state_dict(layer.state_dict())
    tables = GptOssRotaryEmbedding(config)(x_BTD, torch.arange(LENGTH)[None])
    expected_BTD = attention(x_BTD, tables, additive_mask(LENGTH, num_sinks, WINDOW))[0]
    torch.testing.assert_close(layer(x_BTD), expected_BTD, rtol=0, atol=ROUNDING)


@torch.no_grad()
@pytest.mark.parametrize("position", ["cache", "text"])
@pytest.mark.parametrize("sizes", [(1, 6, 22), (12, 3, 14), (29,), (2, 3, 11, 13)])
def test_chunks_with_padding_and_borders_equal_each_document_alone(
    position: str, sizes: tuple[int, ...]
) -> None:
    """Three documents behind padding, given in odd pieces; then steps that continue the last."""
    layer, x_BTD = make(position=position, sink_logits=True), inputs(LENGTH + 9)
    padding, documents = 4, (7, 2, 16)
    numbers = [0] * padding + [n for n, size in enumerate(documents) for _ in range(size)]
    seq_idx_BT = torch.tensor([numbers, numbers])
    mask_BT = torch.arange(LENGTH).expand(2, -1) >= padding
    state = layer.init_state(2, LENGTH + 9, dtype=torch.float64)
    outputs, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        context = Context(seq_idx_BT=seq_idx_BT[:, part], attention_mask_BT=mask_BT[:, part])
        outputs.append(layer(x_BTD[:, part], context, state))
        start += size
    outputs += [layer.step(x_BD, state)[:, None] for x_BD in x_BTD[:, LENGTH:].unbind(1)]
    actual_BTD, start = torch.cat(outputs, 1), padding
    for size in (*documents[:-1], documents[-1] + 9):
        expected_BTD = layer(x_BTD[:, start : start + size])
        actual = actual_BTD[:, start : start + size]
        torch.testing.assert_close(actual, expected_BTD, rtol=0, atol=TOLERANCE)
        start += size
    assert state.count_B.tolist() == [25, 25]


@torch.no_grad()
def test_decodes_far_beyond_its_slots_in_constant_memory() -> None:
    layer, x_BTD = make(), inputs(120)
    state = layer.init_state(2, 1, dtype=torch.float64)
    held = state.num_bytes
    stepped = [layer.step(x_BD, state) for x_BD in x_BTD.unbind(1)]
    torch.testing.assert_close(torch.stack(stepped, 1), layer(x_BTD), rtol=0, atol=TOLERANCE)
    assert state.num_bytes == held == 2 * (2 * KV_HEADS * HEAD_DIM * (SINKS + WINDOW) * 8 + 8)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, 2 * WINDOW, LENGTH])
@pytest.mark.parametrize("position", ["cache", "text"])
def test_flops_are_those_that_torch_counts(length: int, position: str) -> None:
    layer = make(position=position)
    costs = SinkAttention.costs(D_MODEL, layer.config, length=length)
    state = layer.init_state(1, 1, dtype=torch.float64)
    with FlopCounterMode(display=False) as forward:
        layer(inputs(length)[:1])
    with FlopCounterMode(display=False) as step:
        layer.step(inputs()[:1, 0], state)
    assert forward.get_total_flops() == costs.forward_flops
    assert step.get_total_flops() == costs.decode_flops


@pytest.mark.slow
def test_exports_and_reloads_in_a_fresh_process(tmp_path: Path) -> None:
    builder = Builder.load([Path(__file__).parent])
    config = {"num_heads": 4, "num_kv_heads": 2, "window": 8, "sink_logits": True}
    blocks = (Block(layer="sink-attention", config=config), Block(layer="swiglu"))
    layout = builder.resolve(Layout(d_model=D_MODEL, vocab_size=64, blocks=blocks))
    exporter = builder.exporters["huggingface"]
    report = exporter.export(
        builder.build(layout).eval(), builder, tmp_path / "out", exporter.Config(), {}
    )
    assert report.max_difference <= 1e-5
