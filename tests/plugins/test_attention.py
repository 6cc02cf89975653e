"""Attention against transformers' modules with the same weights, and by its properties.

Shape suffixes: B batch, T tokens, D d_model, S keys, H query heads, P head dim.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GraniteMoeHybridConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    StableLmConfig,
)
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridAttention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding
from transformers.models.stablelm.modeling_stablelm import (
    StableLmAttention,
    StableLmRotaryEmbedding,
)

from workbench import config as configs
from workbench.builder import default_builder
from workbench.errors import FieldError
from workbench.layer import Context
from workbench_attention.attention import Attention
from workbench_attention.masks import alibi_slopes
from workbench_attention.rope import rotary_tables

D_MODEL = 32
SHAPE = {"num_heads": 4, "num_kv_heads": 2}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def build(**values: Any) -> Attention:
    """A layer with random weights, none of them neutral."""
    config = configs.from_dict(Attention.Config, SHAPE | values)
    layer = Attention(D_MODEL, config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return layer


def tokens(batch: int, length: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, D_MODEL, generator=generator, dtype=dtype)


def relative(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max())


def additive(seen_BTS: Tensor) -> Tensor:
    """transformers' form of a mask, `[B, 1, T, S]`."""
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(seen_BTS.shape).masked_fill(~seen_BTS, lowest)[:, None]


# Oracles: transformers' modules


def llama_values(**changes: Any) -> dict[str, Any]:
    values = {
        "hidden_size": D_MODEL,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
        "attn_implementation": "eager",
    }
    return values | changes


def theirs(family: str) -> tuple[nn.Module, nn.Module | None, dict[str, Any]]:
    """A module of transformers, its rotary embedding, and the same thing as our Config."""
    ours: dict[str, Any] = {**SHAPE, "rope_theta": 1000.0}
    if family == "llama":
        config = LlamaConfig(**llama_values(attention_bias=True))
        ours |= {"bias": True, "out_bias": True}
        return LlamaAttention(config, 0), LlamaRotaryEmbedding(config), ours
    if family == "qwen3":
        config = Qwen3Config(**llama_values(head_dim=24, rms_norm_eps=1e-3))
        ours |= {"head_dim": 24, "qk_norm": True, "norm_eps": 1e-3}
        return Qwen3Attention(config, 0), Qwen3RotaryEmbedding(config), ours
    if family.startswith("mistral"):
        window = int(family.removeprefix("mistral-"))
        config = MistralConfig(**llama_values(head_dim=8, sliding_window=window))
        ours |= {"sliding_window": window}
        return MistralAttention(config, 0), MistralRotaryEmbedding(config), ours
    if family == "granite":
        config = GraniteMoeHybridConfig(**llama_values(attention_multiplier=0.3, mamba_n_heads=8))
        ours |= {"position": "none", "scale": 0.3}
        return GraniteMoeHybridAttention(config, 0), None, ours
    rope = {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.25}
    config = StableLmConfig(**llama_values(rope_parameters=rope, use_qkv_bias=True))
    ours |= {"partial_rotary_factor": 0.25, "bias": True}
    return StableLmAttention(config, 0), StableLmRotaryEmbedding(config), ours


@pytest.mark.parametrize("length", [1, 7, 40])
@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "mistral-6", "mistral-64", "granite", "stablelm"]
)
def test_outputs_and_gradients_equal_those_of_transformers(family: str, length: int) -> None:
    torch.manual_seed(0)
    reference, rotary, values = theirs(family)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(std=0.4)
    layer = Attention(D_MODEL, configs.from_dict(Attention.Config, values))
    layer.load_state_dict(reference.state_dict())
    x_BTD = tokens(2, length, dtype=torch.float32)
    window = values.get("sliding_window", length)
    seen_TS = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)

    ours_BTD, theirs_BTD = x_BTD.clone().requires_grad_(), x_BTD.clone().requires_grad_()
    tables = None if rotary is None else rotary(x_BTD, torch.arange(length)[None])
    expected_BTD = reference(
        theirs_BTD, position_embeddings=tables, attention_mask=additive(seen_TS.expand(2, -1, -1))
    )[0]
    actual_BTD = layer(ours_BTD)
    upstream_BTD = tokens(2, length, seed=2, dtype=torch.float32)
    actual_BTD.backward(upstream_BTD)
    expected_BTD.backward(upstream_BTD)

    assert relative(actual_BTD, expected_BTD) < 1e-5
    assert ours_BTD.grad is not None
    assert theirs_BTD.grad is not None
    assert relative(ours_BTD.grad, theirs_BTD.grad) < 1e-5
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in layer.named_parameters():
        difference = (parameter.grad - gradients[name]).abs().max()
        assert difference < 1e-5 * largest, name


@pytest.mark.parametrize("num_heads", [1, 2, 3, 6, 8, 12, 20, 33])
def test_alibi_slopes_are_those_of_bloom(num_heads: int) -> None:
    two_tokens = torch.ones(1, 2, dtype=torch.long)
    bloom_H = build_alibi_tensor(two_tokens, num_heads, torch.float32)[:, 0, 1]
    assert torch.allclose(alibi_slopes(num_heads, bloom_H), bloom_H, rtol=1e-6, atol=0)


def test_alibi_equals_attention_with_blooms_bias() -> None:
    layer, x_BTD = build(position="alibi", num_heads=6, num_kv_heads=3, head_dim=4), tokens(2, 9)
    mask_BT = torch.ones(2, 9, dtype=torch.bool)
    mask_BT[1, :4] = False
    bias_BH1S = build_alibi_tensor(mask_BT.long(), 6, torch.float64).view(2, 6, 1, 9)
    seen_B1TS = torch.ones(9, 9, dtype=torch.bool).tril() & mask_BT[:, None, None]

    q, k, v = (
        projection(x_BTD).view(2, 9, -1, 4).transpose(1, 2)
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    scores_BHTS = q @ k.transpose(-1, -2) / 2 + bias_BH1S
    weights_BHTS = scores_BHTS.masked_fill(~seen_B1TS, -1e30).softmax(dim=-1)
    expected_BTD = layer.o_proj((weights_BHTS @ v).transpose(1, 2).flatten(2))

    actual_BTD = layer(x_BTD, Context(attention_mask_BT=mask_BT))
    assert relative(actual_BTD[mask_BT], expected_BTD[mask_BT]) < 1e-12


CONTEXTS = {
    "left padding": ("mask",),
    "documents": ("documents",),
    "prefix": ("prefix",),
    "padding, prefix": ("mask", "prefix"),
    "documents, prefix": ("documents", "prefix"),
    "all": ("mask", "documents", "prefix"),
}


@pytest.mark.parametrize("window", [3, 100])
@pytest.mark.parametrize("parts", CONTEXTS.values(), ids=CONTEXTS)
def test_contexts_mask_as_a_loop_over_pairs_says(parts: tuple[str, ...], window: int) -> None:
    torch.manual_seed(0)
    reference, rotary, values = theirs("mistral-100")
    assert rotary is not None
    layer = Attention(
        D_MODEL, configs.from_dict(Attention.Config, values | {"sliding_window": window})
    )
    layer.load_state_dict(reference.state_dict())
    padding = [3, 0] if "mask" in parts else [0, 0]
    documents = [[0] * 5 + [1] * 6, [0] * 8 + [2] * 3] if "documents" in parts else [[0] * 11] * 2
    prefixes = [4, 7] if "prefix" in parts else [0, 0]

    def sees(row: int, query: int, key: int) -> bool:
        in_prefix = key - padding[row] < prefixes[row]
        return (
            (key <= query or in_prefix)
            and abs(query - key) < window
            and key >= padding[row]
            and documents[row][query] == documents[row][key]
        )

    seen_BTS = torch.tensor(
        [[[sees(b, t, s) for s in range(11)] for t in range(11)] for b in range(2)]
    )
    real_BT = torch.tensor([[t >= padding[b] for t in range(11)] for b in range(2)])
    context = Context(
        attention_mask_BT=real_BT if "mask" in parts else None,
        seq_idx_BT=torch.tensor(documents, dtype=torch.int32) if "documents" in parts else None,
        prefix_lengths_B=torch.tensor(prefixes) if "prefix" in parts else None,
    )
    x_BTD = tokens(2, 11, dtype=torch.float32)
    expected_BTD = reference(
        x_BTD,
        position_embeddings=rotary(x_BTD, torch.arange(11)[None]),
        attention_mask=additive(seen_BTS),
    )[0]
    actual_BTD = layer(x_BTD, context)
    assert relative(actual_BTD[real_BT], expected_BTD[real_BT]) < 1e-5
    assert actual_BTD.isfinite().all()


# Building


def test_it_is_registered_and_builds_on_the_meta_device_without_buffers() -> None:
    assert default_builder().layers["attention"] is Attention
    config = configs.from_dict(Attention.Config, {"position": "alibi", "qk_norm": True})
    layer = Attention(256, config, device="meta", dtype=torch.bfloat16)
    assert layer(torch.empty(2, 9, 256, device="meta", dtype=torch.bfloat16)).shape == (2, 9, 256)
    assert not list(layer.buffers())
    assert (layer.heads.queries, layer.heads.kv, layer.heads.dim) == (4, 4, 64)


def test_resetting_makes_a_layer_from_meta_usable() -> None:
    layer = Attention(64, Attention.Config(qk_norm=True), device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.equal(layer.q_norm.weight, torch.ones(64))
    assert torch.equal(layer.k_norm.weight, torch.ones(64))


def test_rotary_tables_made_in_inference_mode_serve_training() -> None:
    layer = build(rope_theta=4321.0)
    with torch.inference_mode():
        layer(tokens(1, 4))
    layer(tokens(1, 4).requires_grad_()).sum().backward()
    assert layer.q_proj.weight.grad is not None


def test_rotary_tables_continue_at_any_start() -> None:
    like = torch.zeros(())
    whole, part = rotary_tables(0, 40, 8, 77.0, like), rotary_tables(33, 2, 8, 77.0, like)
    assert torch.equal(part[0], whole[0][33:35])
    assert torch.equal(part[1], whole[1][33:35])
    assert math.isclose(float(whole[0][39, 0, 0]), math.cos(39), rel_tol=1e-5)


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_it_exports_with_a_dynamic_length(position: str) -> None:
    layer = build(position=position)
    length = {1: torch.export.Dim("length", min=2, max=512)}
    program = torch.export.export(
        layer,
        (tokens(1, 8),),
        dynamic_shapes=(length,),
    )
    x_BTD = tokens(1, 37)
    assert relative(program.module()(x_BTD), layer(x_BTD)) < 1e-10


@pytest.mark.parametrize(
    ("d_model", "values", "field", "advice"),
    [
        (100, {}, "head_dim", "use 50"),
        (32, {}, "head_dim", "use 32"),
        (96, {"head_dim": 36}, "head_dim", "use 32"),
        (32, {"num_heads": 5}, "num_heads", "use 4"),
        (32, {"num_heads": 0}, "num_heads", "at least 1"),
        (32, {"num_heads": 6, "head_dim": 8, "num_kv_heads": 4}, "num_kv_heads", "1, 2, 3, 6"),
        (32, {"num_heads": 4, "num_kv_heads": 0}, "num_kv_heads", "at least 1"),
        (32, {"num_heads": 2, "head_dim": 7}, "head_dim", "even"),
        (32, {"num_heads": 2, "partial_rotary_factor": 0.2}, "partial_rotary_factor", "even"),
        (32, {"num_heads": 2, "partial_rotary_factor": 0.0}, "partial_rotary_factor", '"none"'),
        (32, {"num_heads": 2, "partial_rotary_factor": 1.5}, "partial_rotary_factor", "at most 1"),
        (32, {"num_heads": 2, "rope_theta": 0.0}, "rope_theta", "above 0"),
        (32, {"num_heads": 2, "sliding_window": 0}, "sliding_window", "at least 1"),
        (32, {"num_heads": 2, "norm_eps": 0.0}, "norm_eps", "above 0"),
    ],
)
def test_what_cannot_be_built_is_refused_by_field(
    d_model: int, values: dict[str, Any], field: str, advice: str
) -> None:
    config = configs.from_dict(Attention.Config, values)
    with pytest.raises(FieldError, match=advice) as caught:
        Attention.check(d_model, config)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "values",
    [
        {"num_heads": 3, "head_dim": 10},  # heads need not tile d_model
        {"num_heads": 2, "head_dim": 7, "position": "none"},
        {"num_heads": 2, "head_dim": 7, "position": "alibi"},
    ],
)
def test_odd_shapes_that_can_be_built_are_accepted(values: dict[str, Any]) -> None:
    config = configs.from_dict(Attention.Config, values)
    Attention.check(D_MODEL, config)
    assert Attention(D_MODEL, config)(torch.randn(1, 3, D_MODEL)).shape == (1, 3, D_MODEL)
