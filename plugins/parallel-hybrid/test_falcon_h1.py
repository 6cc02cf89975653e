"""Layers and presets against transformers' Falcon-H1 with the same weights.

Shape suffixes: B batch, T tokens, D d_model, V vocabulary.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_falcon_h1 import falcon_h1, multipliers
from torch import Tensor
from transformers import DynamicCache, FalconH1Config, FalconH1ForCausalLM

from workbench.builder import Builder
from workbench.layer import PLAIN, Context
from workbench.layout import Block, Layout
from workbench.model import HybridLM

HERE = Path(__file__).parent
TOLERANCE = 1e-5  # of float32, relative to the largest value
VOCABULARY = 61

# A small Falcon-H1 by transformers' names. Its values of no multiplier are neutral.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "mamba_d_ssm": 48,
    "mamba_n_heads": 6,
    "mamba_d_head": 8,
    "mamba_d_state": 16,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 16,
    "mamba_norm_before_gate": False,
    "rms_norm_eps": 1e-4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "embedding_multiplier": 2.3,
    "lm_head_multiplier": 0.4,
    "key_multiplier": 0.6,
    "attention_in_multiplier": 0.8,
    "attention_out_multiplier": 1.7,
    "ssm_in_multiplier": 1.3,
    "ssm_out_multiplier": 0.7,
    "ssm_multipliers": [0.5, 1.5, 0.6, 1.2, 0.9],
    "mlp_multipliers": [0.7, 1.6],
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Layer fields that transformers calls the same, and those it names otherwise.
SAME = (
    "head_dim",
    "key_multiplier",
    "attention_in_multiplier",
    "attention_out_multiplier",
    "ssm_in_multiplier",
    "ssm_out_multiplier",
)
NORMED = pytest.mark.parametrize("normed", [True, False], ids=["normed", "gated"])


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def builder() -> Builder:
    builder = Builder.load([HERE])
    assert not builder.plugins.failures
    return builder


def layout_of(theirs: FalconH1Config) -> Layout:
    """The layout that a configuration of transformers describes."""
    mixer = {name: getattr(theirs, name) for name in SAME} | {
        "num_kv_heads": theirs.num_key_value_heads,
        "queries_per_kv": theirs.num_attention_heads // theirs.num_key_value_heads,
        "rope_theta": theirs.rope_parameters["rope_theta"],
        "num_ssm_heads": theirs.mamba_n_heads,
        "headdim": theirs.mamba_d_head,
        "d_state": theirs.mamba_d_state,
        "n_groups": theirs.mamba_n_groups,
        "chunk_size": theirs.mamba_chunk_size,
        "ssm_norm": theirs.mamba_rms_norm,
        "norm_eps": theirs.rms_norm_eps,
        "ssm_multipliers": list(theirs.ssm_multipliers),
    }
    gate, down = theirs.mlp_multipliers
    mlp = {"intermediate_size": theirs.intermediate_size}
    mlp |= {"gate_multiplier": gate, "down_multiplier": down}
    blocks = (
        Block(layer="parallel-hybrid", config=mixer),
        Block(layer="scaled-swiglu", config=mlp),
    )
    return Layout(
        d_model=theirs.hidden_size,
        vocab_size=theirs.vocab_size,
        blocks=blocks * theirs.num_hidden_layers,
        tie_embeddings=theirs.tie_word_embeddings,
        norm_eps=theirs.rms_norm_eps,
        embedding_multiplier=theirs.embedding_multiplier,
        logits_scaling=1 / theirs.lm_head_multiplier,
    )


def our_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict (or gradients) under our names, output projections side by side."""
    outside = {
        "model.embed_tokens.weight": "embedding.weight",
        "model.final_layernorm.weight": "norm_f.weight",
        "lm_head.weight": "lm_head.weight",
    }
    parts = {
        "input_layernorm": (0, "norm"),
        "self_attn": (0, "layer.attention"),
        "mamba": (0, "layer.ssm"),
        "pre_ff_layernorm": (1, "norm"),
        "feed_forward": (1, "layer"),
    }
    ours: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        if name in outside:
            ours[outside[name]] = tensor
            continue
        _, _, index, module, rest = name.split(".", 4)
        block, prefix = parts[module]
        ours[f"blocks.{2 * int(index) + block}.{prefix}.{rest}"] = tensor
    for name in [name for name in ours if name.endswith("attention.o_proj.weight")]:
        layer = name.removesuffix("attention.o_proj.weight")
        halves = ours.pop(name), ours.pop(layer + "ssm.out_proj.weight")
        ours[layer + "out_proj.weight"] = torch.cat(halves, 1)
        ours[layer + "ssm.in_proj.linear.weight"] = ours.pop(layer + "ssm.in_proj.weight")
    return ours


@cache
def pair(normed: bool) -> tuple[HybridLM, FalconH1ForCausalLM]:
    """Our model and theirs with the same weights, none of them neutral."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = FalconH1ForCausalLM(FalconH1Config(**SMALL, mamba_rms_norm=normed)).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    ours = Builder.load([HERE]).build(layout_of(theirs.config)).eval()
    ours.load_state_dict(our_names(theirs.state_dict()))
    return ours, theirs


def tokens(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(VOCABULARY, (batch, length), generator=generator)


def activations(batch: int, length: int, width: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, width, generator=generator)


def relative(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max())


# One block against transformers' decoder layer


def decoder_layer(normed: bool, x_BTD: Tensor) -> Tensor:
    """What their first decoder layer gives, mixers and MLP with their norms and residuals."""
    theirs = pair(normed)[1].model
    positions_1T = torch.arange(x_BTD.shape[1])[None]
    length = x_BTD.shape[1]
    return theirs.layers[0](  # type: ignore[no-any-return]
        x_BTD,
        attention_mask=torch.full((length, length), -torch.inf).triu(1)[None, None],
        position_ids=positions_1T,
        position_embeddings=theirs.rotary_emb(x_BTD, position_ids=positions_1T),
    )[0]


def our_layer(normed: bool, x_BTD: Tensor) -> Tensor:
    for block in pair(normed)[0].blocks[:2]:
        x_BTD = block(x_BTD, PLAIN, None)
    return x_BTD


@pytest.mark.parametrize("length", [1, 7, 33, 51])
@NORMED
def test_a_decoder_layer_and_its_gradients_agree(normed: bool, length: int) -> None:
    ours, theirs = pair(normed)
    weights_BTD = activations(2, length + 1)[:, :length]
    gradients = []
    for function, model in ((our_layer, ours), (decoder_layer, theirs)):
        model.zero_grad()
        x_BTD = activations(2, length).requires_grad_()
        y_BTD = function(normed, x_BTD)
        (y_BTD * weights_BTD).sum().backward()
        named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        gradients.append((y_BTD, x_BTD.grad, named))
    (y_BTD, x_grad, named), (their_y_BTD, their_x_grad, their_named) = gradients
    assert relative(y_BTD, their_y_BTD) < TOLERANCE
    assert x_grad is not None
    assert their_x_grad is not None
    assert relative(x_grad, their_x_grad) < TOLERANCE
    expected = our_names(their_named)
    assert set(named) == set(expected)
    # Of a single token queries and keys have no gradient but rounding.
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in named.items():
        scale = max(float(expected[name].abs().max()), 1e-2 * largest)
        assert float((gradient - expected[name]).abs().max()) < TOLERANCE * scale, name


# Whole models


@pytest.mark.parametrize("length", [1, 7, 33, 51])
@NORMED
@torch.no_grad()
def test_logits_agree(normed: bool, length: int) -> None:
    ours, theirs = pair(normed)
    tokens_BT = tokens(2, length)
    assert relative(ours(tokens_BT), theirs(tokens_BT).logits) < TOLERANCE


@NORMED
@torch.no_grad()
def test_logits_agree_on_rows_padded_on_the_left(normed: bool) -> None:
    ours, theirs = pair(normed)
    tokens_BT, mask_BT = tokens(3, 21), torch.ones(3, 21, dtype=torch.bool)
    mask_BT[0, :5], mask_BT[2, :13] = False, False
    expected_BTV = theirs(tokens_BT, attention_mask=mask_BT.long()).logits
    actual_BTV = ours(tokens_BT, Context(attention_mask_BT=mask_BT))
    assert relative(actual_BTV[mask_BT], expected_BTV[mask_BT]) < TOLERANCE


@NORMED
@torch.no_grad()
def test_cached_decoding_agrees(normed: bool) -> None:
    """Their cache and ours, a prompt and then token by token, against their full forward, too."""
    ours, theirs = pair(normed)
    tokens_BT, prompt = tokens(2, 33), 11
    states, cache = ours.init_state(2, 33), DynamicCache(config=theirs.config)
    actual = [ours.prefill(tokens_BT[:, :prompt], states)]
    expected = [theirs(tokens_BT[:, :prompt], past_key_values=cache).logits[:, -1]]
    for tokens_B in tokens_BT[:, prompt:].unbind(1):
        actual.append(ours.step(tokens_B, states))
        expected.append(theirs(tokens_B[:, None], past_key_values=cache).logits[:, -1])
    assert relative(torch.stack(actual, 1), torch.stack(expected, 1)) < TOLERANCE
    whole_BTV = theirs(tokens_BT).logits[:, prompt - 1 :]
    assert relative(torch.stack(actual, 1), whole_BTV) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("name", [*SAME[1:], "ssm_multipliers", "mlp_multipliers"])
def test_every_multiplier_matters(builder: Builder, name: str) -> None:
    """No multiplier is so placed that the comparisons above could not see it missing."""
    ours, theirs = pair(True)
    neutral = [1.0] * len(SMALL[name]) if isinstance(SMALL[name], list) else 1.0
    changed = FalconH1Config(**SMALL | {name: neutral}, mamba_rms_norm=True)
    other = builder.build(layout_of(changed)).eval()
    weights = ours.state_dict()
    if name == "ssm_multipliers":
        weights = {key.replace("in_proj.linear", "in_proj"): w for key, w in weights.items()}
    other.load_state_dict(weights)
    tokens_BT = tokens(2, 21)
    assert relative(other(tokens_BT), theirs(tokens_BT).logits) > 1e-3


# Presets

# What shapes the models: 0.5B whole, 1.5B but for the multipliers that could not be read, of larger
# ones widths and multipliers. From copies of the hub's config.json and readings of it.
CONFIGS: dict[str, dict[str, Any]] = {
    name: entry["config"]
    for name, entry in json.loads((HERE / "published_configs.json").read_text("utf-8")).items()
}
CHECKPOINTS = {"falcon-h1-0.5b": 521_411_104, "falcon-h1-1.5b": 1_554_863_488}
each_preset = pytest.mark.parametrize("name", CHECKPOINTS)


@each_preset
def test_a_preset_counts_what_transformers_counts(builder: Builder, name: str) -> None:
    with torch.device("meta"):
        theirs = FalconH1ForCausalLM(FalconH1Config(**CONFIGS[name]))
    layout = builder.presets[name].layout()
    counted = builder.costs(layout, length=1).total.parameters
    assert counted == theirs.num_parameters() == CHECKPOINTS[name]
    assert builder.build(layout, device="meta").num_parameters == counted


@each_preset
def test_a_preset_says_what_the_configuration_says(builder: Builder, name: str) -> None:
    published = layout_of(FalconH1Config(**CONFIGS[name]))
    assert_same_data(builder, builder.presets[name].layout(), published, CONFIGS[name])


def assert_same_data(builder: Builder, ours: Layout, theirs: Layout, known: dict[str, Any]) -> None:
    """Equality of all that the configuration states, to rounding."""
    ours, theirs = builder.resolve(ours), builder.resolve(theirs)
    shape, their_shape = ours.to_dict(), theirs.to_dict()
    for field in shape.keys() - {"blocks"}:
        assert_same(shape[field], their_shape[field], field)
    for our_block, their_block in zip(ours.blocks, theirs.blocks, strict=True):
        assert our_block.layer == their_block.layer
        for field, value in their_block.config.items():
            source = "mlp_multipliers" if field in ("gate_multiplier", "down_multiplier") else field
            if "multiplier" not in source or source in known:
                assert_same(our_block.config[field], value, field)


def assert_same(ours: Any, theirs: Any, field: str) -> None:
    exact = isinstance(theirs, str | None)
    assert ours == (theirs if exact else pytest.approx(theirs, rel=1e-12)), field


@pytest.mark.parametrize("name", CONFIGS)
def test_published_multipliers_follow_the_widths(name: str) -> None:
    """The rule from which those of 1.5B are taken that could not be read."""
    published = CONFIGS[name]
    computed = multipliers(
        d_model=published["hidden_size"],
        attention_width=published["num_attention_heads"] * published["head_dim"],
        head_dim=published["head_dim"],
        d_ssm=published["mamba_d_ssm"],
        d_state=published["mamba_d_state"],
        intermediate_size=published["intermediate_size"],
    )
    known = computed.keys() & published.keys()
    assert len(known) >= (3 if name == "falcon-h1-1.5b" else 9)
    for multiplier in known:
        assert_same(computed[multiplier], published[multiplier], multiplier)


@torch.no_grad()
def test_a_shrunken_preset_has_the_logits_of_transformers(builder: Builder) -> None:
    """The preset's own function at small widths, its multipliers given to transformers' class."""
    shape: dict[str, Any] = {"head_dim": 16, "d_state": 16, "intermediate_size": 80}
    layout = falcon_h1(
        d_model=64, vocab_size=VOCABULARY, num_layers=2, num_heads=4, num_kv_heads=2,
        ssm_heads=6, headdim=16, ssm_norm=True, **shape,
    )  # fmt: skip
    scales = multipliers(d_model=64, attention_width=64, d_ssm=96, **shape)
    small = SMALL | scales | {"hidden_size": 64, "intermediate_size": 80, "head_dim": 16}
    small |= {"mamba_d_ssm": 96, "mamba_d_head": 16, "mamba_n_groups": 1, "rms_norm_eps": 1e-5}
    small |= {
        "rope_parameters": CONFIGS["falcon-h1-0.5b"]["rope_parameters"],
        "mamba_chunk_size": 128,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = FalconH1ForCausalLM(FalconH1Config(**small, mamba_rms_norm=True)).eval()
    ours = builder.build(layout).eval()
    ours.load_state_dict(our_names(theirs.state_dict()))
    tokens_BT = tokens(2, 45)
    expected_BTV = theirs(tokens_BT).logits
    assert relative(ours(tokens_BT), expected_BTV) < TOLERANCE
    states = ours.init_state(2, 45)
    decoded = [ours.prefill(tokens_BT[:, :9], states)]
    decoded += [ours.step(tokens_B, states) for tokens_B in tokens_BT[:, 9:].unbind(1)]
    assert relative(torch.stack(decoded, 1), expected_BTV[:, 8:]) < TOLERANCE
