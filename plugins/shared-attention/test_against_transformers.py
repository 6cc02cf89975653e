"""Zamba2 as a Layout: what transformers' own class counts and computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lm_shared_attention import zamba2_2_7b
from transformers import Zamba2Config, Zamba2ForCausalLM

from workbench.builder import Builder
from workbench.layout import Block, Layout
from workbench.model import HybridLM

HERE = Path(__file__).parent
KINDS = ["linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid", "hybrid"]


@pytest.fixture(scope="module")
def builder() -> Builder:
    return Builder.load([HERE])


def test_the_preset_counts_what_transformers_counts(builder: Builder) -> None:
    with torch.device("meta"):
        theirs = Zamba2ForCausalLM(Zamba2Config(num_mem_blocks=2, n_mamba_heads=80))
    theirs.tie_weights()
    expected = sum(parameter.numel() for parameter in theirs.parameters())
    layout = builder.presets["zamba2-2.7b"].layout()
    assert layout == zamba2_2_7b()
    assert builder.costs(layout, length=1).total.parameters == expected
    ours = builder.build(layout, device="meta")
    assert ours.num_parameters == expected
    assert [b.layer for b in layout.blocks].count("zamba2") == 9
    assert ours.sources[12] is None
    assert ours.sources[18] == 6
    assert ours.sources[51] == 6
    assert ours.sources[47] == 12


def small_config(**changes: object) -> Zamba2Config:
    values = {
        "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": len(KINDS),
        "layers_block_type": list(KINDS), "mamba_d_state": 8, "n_mamba_heads": 4,
        "mamba_ngroups": 2, "num_attention_heads": 4, "num_mem_blocks": 2, "adapter_rank": 3,
        "chunk_size": 8,
        "time_step_min": 1e-30,  # transformers clamps steps at it, in prefill only
    }  # fmt: skip
    return Zamba2Config(**{**values, **changes})


def layout_of(config: Zamba2Config) -> Layout:
    mamba = {
        "d_state": config.mamba_d_state, "headdim": config.mamba_headdim,
        "n_groups": config.mamba_ngroups, "chunk_size": config.chunk_size,
    }  # fmt: skip
    hybrid = {
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "position": "rope" if config.use_mem_rope else "none",
        "adapter_rank": config.adapter_rank,
        "attention_adapter": config.use_shared_attention_adapter,
        **mamba,
    }
    blocks, hybrids = [], 0
    for kind in config.layers_block_type:
        if kind == "hybrid":
            group = hybrids % config.num_mem_blocks
            blocks.append(Block(layer="zamba2", config={**hybrid, "group": group}))
            hybrids += 1
        else:
            blocks.append(Block(layer="mamba2", config=mamba))
    return Layout(d_model=config.hidden_size, vocab_size=config.vocab_size, blocks=tuple(blocks))


def transfer(theirs: Zamba2ForCausalLM, ours: HybridLM) -> None:
    """Copy every weight; each of ours must be filled, each of theirs used."""
    config, used = theirs.config, set()
    state = theirs.state_dict()

    def take(name: str) -> torch.Tensor:
        used.add(name)
        return state[name]

    shared = {
        "input_norm.weight": "input_layernorm.weight",
        "attention.q_proj.weight": "self_attn.q_proj.weight",
        "attention.k_proj.weight": "self_attn.k_proj.weight",
        "attention.v_proj.weight": "self_attn.v_proj.weight",
        "attention.o_proj.weight": "self_attn.o_proj.weight",
        "mlp_norm.weight": "pre_ff_layernorm.weight",
        "gate_up_proj.weight": "feed_forward.gate_up_proj.weight",
        "down_proj.weight": "feed_forward.down_proj.weight",
    }
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if not name.startswith("blocks."):
                source = {"embedding.weight": "embed_tokens.weight"}.get(
                    name, "final_layernorm.weight"
                )
                parameter.copy_(take(f"model.{source}"))
                continue
            _, depth, child, *rest = name.split(".")
            prefix, rest_name = f"model.layers.{depth}", ".".join(rest)
            if int(depth) not in config.hybrid_layer_ids:
                inner = "input_layernorm.weight" if child == "norm" else f"mamba.{rest_name}"
                parameter.copy_(take(f"{prefix}.{inner}"))
                continue
            slot = config.hybrid_layer_ids.index(int(depth))
            if rest[0] == "transformer":
                inner = shared[".".join(rest[1:])]
                parameter.copy_(take(f"{prefix}.shared_transformer.{inner}"))
            elif rest[0] == "mlp_adapter":
                inner = f"feed_forward.gate_up_proj_adapter_list.{slot}.{'.'.join(rest[1:])}"
                parameter.copy_(take(f"{prefix}.shared_transformer.{inner}"))
            elif rest[0] == "attention_adapters":
                which = "qkv"[int(rest[1])]
                inner = f"self_attn.linear_{which}_adapter_list.{slot}.{'.'.join(rest[2:])}"
                parameter.copy_(take(f"{prefix}.shared_transformer.{inner}"))
            elif rest[0] == "linear":
                parameter.copy_(take(f"{prefix}.linear.weight"))
            else:
                inner = "input_layernorm.weight" if rest[0] == "norm" else rest_name
                parameter.copy_(take(f"{prefix}.mamba_decoder.{inner}"))
    pointers = {state[name].data_ptr() for name in used}
    assert {name for name, value in state.items() if value.data_ptr() not in pointers} == set()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_shared_attention_adapter": True, "use_mem_rope": True, "num_mem_blocks": 1},
    ],
    ids=["2.7B", "1.2B"],
)
def test_logits_are_transformers(builder: Builder, changes: dict[str, object]) -> None:
    torch.manual_seed(0)
    config = small_config(**changes)
    theirs = Zamba2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            # Norms and biases start at one and zero, where a forgotten one would not show.
            scale = 0.3 if "norm" in name or parameter.dim() == 1 else 0.05
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    ours = builder.build(layout_of(config)).eval()
    transfer(theirs, ours)
    assert ours.num_parameters == sum(parameter.numel() for parameter in theirs.parameters())
    tokens_BT = torch.randint(config.vocab_size, (2, 21))
    with torch.no_grad():
        expected_BTV = theirs(tokens_BT).logits
        actual_BTV = ours(tokens_BT)
        states = ours.init_state(2, 21)
        first_BV = ours.prefill(tokens_BT[:, :13], states)
        stepped = [first_BV, *(ours.step(tokens_B, states) for tokens_B in tokens_BT[:, 13:].T)]
        cache = theirs(tokens_BT[:, :13], use_cache=True)
        theirs_stepped = [cache.logits[:, -1]]
        for tokens_B in tokens_BT[:, 13:].T:
            cache = theirs(tokens_B[:, None], past_key_values=cache.past_key_values, use_cache=True)
            theirs_stepped.append(cache.logits[:, -1])
    scale = float(expected_BTV.abs().max())
    assert float((actual_BTV - expected_BTV).abs().max()) <= 1e-5 * scale
    difference = torch.stack(stepped) - torch.stack(theirs_stepped)
    assert float(difference.abs().max()) <= 1e-5 * scale
