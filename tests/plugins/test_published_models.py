"""Whole models of transformers, rebuilt as Layouts, with the same weights.

Each family is a small random model; what must agree are logits, gradients, cached decoding and
greedy generation. Shape suffixes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.plugins.published_weights import our_names
from workbench.builder import default_builder
from workbench.layer import Context
from workbench.layout import Block, Layout
from workbench.model import HybridLM

VOCABULARY = 61
# No end token: generation must not stop early.
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
HEADS: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2}
WIDTH: dict[str, Any] = {"intermediate_size": 48}


@dataclasses.dataclass(frozen=True)
class Family:
    """A model of transformers, and the Layout that should be the same function."""

    model: PreTrainedModel
    layout: Layout
    blocks_per_layer: int = 2


def layout(*blocks: tuple[str, dict[str, Any]], **values: Any) -> Layout:
    return Layout(
        d_model=32,
        vocab_size=VOCABULARY,
        blocks=tuple(Block(layer=layer, config=config) for layer, config in blocks),
        **{"tie_embeddings": False, "norm_eps": 1e-4} | values,
    )


def llama() -> Family:
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    config = LlamaConfig(
        **SHARED,
        num_hidden_layers=2,
        rope_parameters=rope,
        rms_norm_eps=1e-4,
        tie_word_embeddings=True,
    )
    layer = (("attention", HEADS | {"rope_theta": 5000.0}), ("swiglu", WIDTH))
    return Family(LlamaForCausalLM(config), layout(*layer, *layer, tie_embeddings=True))


def qwen3() -> Family:
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    config = Qwen3Config(
        **SHARED, num_hidden_layers=2, rope_parameters=rope, head_dim=24, rms_norm_eps=1e-3
    )
    attention = HEADS | {"rope_theta": 5000.0, "head_dim": 24, "qk_norm": True, "norm_eps": 1e-3}
    layer = (("attention", attention), ("swiglu", WIDTH))
    return Family(Qwen3ForCausalLM(config), layout(*layer, *layer, norm_eps=1e-3))


def granite() -> Family:
    config = GraniteMoeHybridConfig(
        **SHARED,
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=48,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=16,
        mamba_n_groups=2,
        mamba_chunk_size=16,
        rms_norm_eps=1e-4,
        position_embedding_type=None,
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.3,
        logits_scaling=2.0,
    )
    shape = {"d_state": 16, "headdim": 8, "n_groups": 2, "grouped_norm": True}
    mamba2 = ("mamba2", shape | {"norm_eps": 1e-4})
    attention = ("attention", HEADS | {"position": "none", "scale": 0.2})
    mlp = ("swiglu", WIDTH)
    return Family(
        GraniteMoeHybridForCausalLM(config),
        layout(
            *(mamba2, mlp, attention, mlp, mamba2, mlp),
            embedding_multiplier=3.0,
            residual_multiplier=0.3,
            logits_scaling=2.0,
        ),
    )


def nemotron_h() -> Family:
    config = NemotronHConfig(
        **SHARED,
        layers_block_type=["mamba", "mlp", "attention", "mlp", "mamba"],
        head_dim=12,
        mamba_num_heads=6,  # 6 heads of 16 are more channels than expand * d_model
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=2,
        chunk_size=16,
        layer_norm_epsilon=1e-4,
        time_step_min=1e-30,  # its prefill clamps steps there, its decoding does not
    )
    mamba2 = {"d_state": 16, "headdim": 16, "num_heads": 6, "n_groups": 2}
    mamba2 |= {"grouped_norm": True, "norm_eps": 1e-4}
    blocks = {
        "mamba": ("mamba2", mamba2),
        "mlp": ("relu2_mlp", WIDTH),
        "attention": ("attention", HEADS | {"head_dim": 12, "position": "none"}),
    }
    names = ("mamba", "mlp", "attention", "mlp", "mamba")
    return Family(
        NemotronHForCausalLM(config),
        layout(*(blocks[name] for name in names)),
        blocks_per_layer=1,
    )


def jamba() -> Family:
    config = JambaConfig(
        **SHARED,
        num_hidden_layers=4,
        num_experts=1,
        num_experts_per_tok=1,
        attn_layer_period=4,
        attn_layer_offset=2,
        mamba_d_state=8,
        mamba_dt_rank=3,
        rms_norm_eps=1e-4,
    )
    mamba = ("mamba", {"d_state": 8, "dt_rank": 3, "dt_bc_norm": True, "norm_eps": 1e-4})
    attention = ("attention", HEADS | {"position": "none"})
    mlp = ("swiglu", WIDTH)
    return Family(
        JambaForCausalLM(config),
        layout(*(mamba, mlp, mamba, mlp, attention, mlp, mamba, mlp)),
    )


FAMILIES = {
    "llama": llama,
    "qwen3": qwen3,
    "granite": granite,
    "nemotron_h": nemotron_h,
    "jamba": jamba,
}
each_family = pytest.mark.parametrize("family", FAMILIES)


@cache
def pair(family: str) -> tuple[HybridLM, PreTrainedModel]:
    """Our model and theirs, with the same weights, none of them neutral."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = FAMILIES[family]()
        with torch.no_grad():
            for parameter in made.model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    ours = default_builder().build(made.layout)
    ours.load_state_dict(our_names(made.model.state_dict(), made.blocks_per_layer))
    return ours.eval(), made.model.eval()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(
        VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length)
    )


def relative(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max())


@each_family
def test_they_have_the_same_number_of_parameters(family: str) -> None:
    ours, theirs = pair(family)
    costs = default_builder().costs(ours.layout, length=8)
    assert costs.total.parameters == ours.num_parameters == theirs.num_parameters()


@pytest.mark.parametrize("length", [1, 7, 16, 45])
@each_family
def test_logits_agree(family: str, length: int) -> None:
    ours, theirs = pair(family)
    tokens_BT = tokens(2, length)
    with torch.no_grad():
        assert relative(ours(tokens_BT), theirs(tokens_BT).logits) < 1e-5


@each_family
def test_logits_agree_on_rows_padded_on_the_left(family: str) -> None:
    ours, theirs = pair(family)
    tokens_BT = tokens(3, 21)
    mask_BT = torch.ones(3, 21, dtype=torch.bool)
    mask_BT[0, :5], mask_BT[2, :13] = False, False
    with torch.no_grad():
        expected_BTV = theirs(tokens_BT, attention_mask=mask_BT.long()).logits
        actual_BTV = ours(tokens_BT, Context(attention_mask_BT=mask_BT))
    assert relative(actual_BTV[mask_BT], expected_BTV[mask_BT]) < 1e-5


@each_family
def test_gradients_agree(family: str) -> None:
    ours, theirs = pair(family)
    tokens_BT = tokens(2, 21)
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    ours.zero_grad()
    theirs.zero_grad()
    loss = ours.loss(inputs_BT, targets_BT)
    loss.backward()
    expected = torch.nn.functional.cross_entropy(
        theirs(inputs_BT).logits.flatten(0, 1), targets_BT.flatten()
    )
    expected.backward()
    assert relative(loss, expected) < 1e-5

    blocks_per_layer = len(ours.blocks) // theirs.config.num_hidden_layers
    gradients = our_names(
        {name: parameter.grad for name, parameter in theirs.named_parameters()}, blocks_per_layer
    )
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        difference = float((parameter.grad - gradients[name]).abs().max())
        assert difference < 1e-5 * largest, f"{name} differs by {difference / largest:.1e}"


@each_family
def test_cached_decoding_equals_the_forward(family: str) -> None:
    ours, _ = pair(family)
    tokens_BT = tokens(2, 33)
    states = ours.init_state(2, 33)
    with torch.no_grad():
        expected_BTV = ours(tokens_BT)
        outputs = [ours.prefill(tokens_BT[:, :11], states)]
        outputs += [ours.step(tokens_B, states) for tokens_B in tokens_BT[:, 11:].unbind(1)]
    assert relative(torch.stack(outputs, dim=1), expected_BTV[:, 10:]) < 1e-5


@each_family
def test_greedy_generation_gives_the_same_tokens(family: str) -> None:
    ours, theirs = pair(family)
    prompt_BT = tokens(3, 9)
    mask_BT = torch.ones(3, 9, dtype=torch.bool)
    mask_BT[1, :4] = False
    expected_BT = theirs.generate(
        prompt_BT, attention_mask=mask_BT.long(), do_sample=False, max_new_tokens=8
    )[:, 9:]
    states = ours.init_state(3, 17)
    with torch.no_grad():
        scores_BV = ours.prefill(prompt_BT, states, Context(attention_mask_BT=mask_BT))
        chosen = [scores_BV.argmax(-1)]
        while len(chosen) < 8:
            chosen.append(ours.step(chosen[-1], states).argmax(-1))
    assert torch.equal(torch.stack(chosen, dim=1), expected_BT)
