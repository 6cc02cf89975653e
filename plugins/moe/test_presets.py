"""The presets against transformers: counts of the published sizes, logits of shrunken copies.

Shape suffixes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import _theirs
import pytest
import torch
from lm_moe_presets import granite_moe_hybrid, jamba
from torch import Tensor
from transformers import (
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    PreTrainedModel,
)

import workbench
from workbench.builder import Builder
from workbench.model import HybridLM
from workbench.testing.allocations import Allocations

ATTENTION_AT = {5, 15, 25, 35}
GRANITE: dict[str, Any] = {
    "vocab_size": 100_352,
    "num_hidden_layers": 40,
    "layer_types": ["attention" if i in ATTENTION_AT else "mamba" for i in range(40)],
    "mamba_d_state": 128,
    "mamba_d_head": 64,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 256,
    "tie_word_embeddings": True,
    "position_embedding_type": None,
}
# Jamba: the defaults of transformers' JambaConfig; the Granites: their model cards.
PUBLISHED = {
    "jamba-v0.1": (
        JambaForCausalLM,
        JambaConfig(
            vocab_size=65_536,
            hidden_size=4096,
            intermediate_size=14_336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            num_experts=16,
            num_experts_per_tok=2,
            expert_layer_period=2,
            expert_layer_offset=1,
            attn_layer_period=8,
            attn_layer_offset=4,
            mamba_d_state=16,
            mamba_d_conv=4,
            mamba_expand=2,
            mamba_dt_rank=256,
            mamba_conv_bias=True,
            mamba_proj_bias=False,
            tie_word_embeddings=False,
        ),
    ),
    "granite-4.0-h-tiny": (
        GraniteMoeHybridForCausalLM,
        GraniteMoeHybridConfig(
            **GRANITE,
            hidden_size=1536,
            num_attention_heads=12,
            num_key_value_heads=4,
            mamba_n_heads=48,
            intermediate_size=512,
            shared_intermediate_size=1024,
            num_local_experts=64,
            num_experts_per_tok=6,
        ),
    ),
    "granite-4.0-h-small": (
        GraniteMoeHybridForCausalLM,
        GraniteMoeHybridConfig(
            **GRANITE,
            hidden_size=4096,
            num_attention_heads=32,
            num_key_value_heads=8,
            mamba_n_heads=128,
            intermediate_size=768,
            shared_intermediate_size=1536,
            num_local_experts=72,
            num_experts_per_tok=10,
        ),
    ),
}
# name → stated, total and active in units of 1e9
STATED = {
    "jamba-v0.1": ("52B total, 12B active", 52, 12),
    "granite-4.0-h-tiny": ("7B total, 1B active", 7, 1),
    "granite-4.0-h-small": ("32B total, 9B active", 32, 9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_those_of_transformers(builder_with_moe: Builder, name: str) -> None:
    model_class, config = PUBLISHED[name]
    with torch.device("meta"):
        theirs = model_class(config)
    theirs.tie_weights()
    counts = {key: parameter.numel() for key, parameter in theirs.named_parameters()}
    experts = sum(count for key, count in counts.items() if ".experts." in key)
    unused = experts - experts * config.num_experts_per_tok // config.num_local_experts
    layout = builder_with_moe.presets[name].layout()
    total = builder_with_moe.costs(layout, length=1).total
    assert total.parameters == sum(counts.values())
    assert total.active_parameters == sum(counts.values()) - unused
    assert builder_with_moe.build(layout, device="meta").num_parameters == total.parameters


@pytest.mark.parametrize("name", STATED)
def test_claims_are_kept_apart_and_near(builder_with_moe: Builder, name: str) -> None:
    stated, billions, active_billions = STATED[name]
    preset = builder_with_moe.presets[name]
    assert preset.stated_parameters == stated
    assert preset.source
    assert preset.assumptions
    total = builder_with_moe.costs(preset.layout(), length=1).total
    assert total.parameters == pytest.approx(billions * 1e9, rel=0.02)
    assert abs(total.active_parameters - active_billions * 1e9) < 0.5e9


def test_jambas_layers_stand_where_the_paper_puts_them(builder_with_moe: Builder) -> None:
    layout = builder_with_moe.presets["jamba-v0.1"].layout()
    assert builder_with_moe.pattern(layout) == "M-MEM-MEA-MEM-ME" * 4


@pytest.mark.parametrize("name", STATED)
def test_describing_is_quick_and_allocates_no_weights(name: str) -> None:
    started = time.process_time()
    with Allocations() as allocations:
        description = workbench.describe(name, plugin_dirs=[Path(__file__).parent])
    assert time.process_time() - started < 2
    assert allocations.operations == []
    assert STATED[name][0] in str(description)


VOCABULARY = 61
NO_SPECIAL_TOKENS: dict[str, Any] = {
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def small_jamba(builder: Builder) -> tuple[HybridLM, PreTrainedModel]:
    config = JambaConfig(
        **NO_SPECIAL_TOKENS,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=5,
        num_experts_per_tok=2,
        mamba_d_state=8,
    )
    layout = jamba(
        d_model=32,
        vocab_size=VOCABULARY,
        num_layers=8,
        attention_period=8,
        attention_offset=4,
        expert_period=2,
        expert_offset=1,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=48,
        num_experts=5,
        top_k=2,
        d_state=8,
    )
    return builder.build(layout), JambaForCausalLM(config)


def small_granite(builder: Builder) -> tuple[HybridLM, PreTrainedModel]:
    config = GraniteMoeHybridConfig(
        **NO_SPECIAL_TOKENS,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=24,
        shared_intermediate_size=40,
        num_hidden_layers=4,
        layer_types=["mamba", "attention", "mamba", "mamba"],
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=6,
        num_experts_per_tok=3,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=16,
        mamba_chunk_size=16,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        position_embedding_type=None,
        embedding_multiplier=12.0,
        attention_multiplier=0.125,
        residual_multiplier=0.22,
        logits_scaling=6.0,
    )
    layout = granite_moe_hybrid(
        d_model=32,
        vocab_size=VOCABULARY,
        num_layers=4,
        attention_layers=(1,),
        num_heads=4,
        num_kv_heads=2,
        mamba_headdim=8,
        d_state=16,
        chunk_size=16,
        intermediate_size=24,
        shared_intermediate_size=40,
        num_experts=6,
        top_k=3,
        attention_multiplier=0.125,
        logits_scaling=6.0,
    )
    return builder.build(layout), GraniteMoeHybridForCausalLM(config)


@pytest.fixture(scope="module", params=[small_jamba, small_granite], ids=["jamba", "granite"])
def pair(
    request: pytest.FixtureRequest, builder_with_moe: Builder
) -> tuple[HybridLM, PreTrainedModel]:
    """Our model and theirs, with the same weights, none of them neutral."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ours, theirs = request.param(builder_with_moe)
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    ours.load_state_dict(_theirs.model(theirs.state_dict()))
    return ours.eval(), theirs.eval()


Pair = tuple[HybridLM, PreTrainedModel]


def tokens(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(VOCABULARY, (batch, length), generator=generator)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


@torch.no_grad()
def test_logits_of_the_full_forward(pair: Pair) -> None:
    ours, theirs = pair
    for length in (1, 7, 33):
        tokens_BT = tokens(2, length)
        assert relative(ours(tokens_BT), theirs(tokens_BT).logits) <= 1e-5


@torch.no_grad()
def test_logits_of_cached_decoding(pair: Pair) -> None:
    ours, theirs = pair
    tokens_BT = tokens(2, 24)
    states = ours.init_state(2, 24)
    outputs = [ours.prefill(tokens_BT[:, :11], states)]
    outputs += [ours.step(tokens_B, states) for tokens_B in tokens_BT[:, 11:].unbind(1)]
    decoded_BTV = torch.stack(outputs, dim=1)
    assert relative(decoded_BTV, theirs(tokens_BT).logits[:, 10:]) <= 1e-5

    answer = theirs(tokens_BT[:, :11], use_cache=True)
    theirs_decoded = [answer.logits[:, -1]]
    for index in range(11, 24):
        answer = theirs(
            tokens_BT[:, index : index + 1], past_key_values=answer.past_key_values, use_cache=True
        )
        theirs_decoded.append(answer.logits[:, -1])
    assert relative(decoded_BTV, torch.stack(theirs_decoded, dim=1)) <= 1e-5


def test_gradients(pair: Pair) -> None:
    ours, theirs = pair
    inputs_BT, targets_BT = tokens(2, 17), tokens(2, 18)[:, 1:]
    ours.zero_grad()
    theirs.zero_grad()
    ours.loss(inputs_BT, targets_BT).backward()
    torch.nn.functional.cross_entropy(
        theirs(inputs_BT).logits.flatten(0, 1), targets_BT.flatten()
    ).backward()
    expected = _theirs.model({key: value.grad for key, value in theirs.named_parameters()})
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert float((parameter.grad - expected[name]).abs().max()) <= 1e-5 * largest, name
