"""Published hybrids with experts as Layouts: Jamba-v0.1 and the two large Granite 4.0 H.

A plugin of its own beside `lm_moe`, so that an exported layer does not carry it.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from workbench.hookspecs import Register, hookimpl
from workbench.layout import Block, Layout
from workbench.preset import Preset, interleave, interspersed


def jamba(
    *,
    d_model: int,
    vocab_size: int,
    num_layers: int,
    attention_period: int,
    attention_offset: int,
    expert_period: int,
    expert_offset: int,
    num_heads: int,
    num_kv_heads: int,
    intermediate_size: int,
    num_experts: int,
    top_k: int,
    d_state: int = 16,
    norm_eps: float = 1e-6,
) -> Layout:
    """Mamba with normed dt, B and C; seldom attention without positions; experts by turns; untied.

    Args:
        attention_period, attention_offset: layer i is attention where
            `i % attention_period == attention_offset`; the same for experts.
    """
    mamba = Block(
        layer="mamba",
        config={
            "d_state": d_state,
            "d_conv": 4,
            "expand": 2,
            "dt_bc_norm": True,
            "norm_eps": norm_eps,
        },
    )
    attention = Block(
        layer="attention",
        config={"num_heads": num_heads, "num_kv_heads": num_kv_heads, "position": "none"},
    )
    width = {"intermediate_size": intermediate_size}
    mlp = Block(layer="swiglu", config=width)
    experts = Block(
        layer="moe",
        config={
            **width,
            "num_experts": num_experts,
            "top_k": top_k,
            "router": "softmax",
            "aux_loss_weight": 0.001,
        },
    )
    attentions = range(attention_offset, num_layers, attention_period)
    sparse = range(expert_offset, num_layers, expert_period)
    return Layout(
        d_model=d_model,
        vocab_size=vocab_size,
        blocks=interleave(
            interspersed(num_layers, mamba, attention, attentions),
            interspersed(num_layers, mlp, experts, sparse),
        ),
        tie_embeddings=False,
        norm_eps=norm_eps,
    )


JAMBA_OPEN = (
    "The values are the defaults of transformers' JambaConfig, whose documentation names this "
    "checkpoint. Experts have the width of the dense MLPs. The weight of the load-balance loss is "
    "router_aux_loss_coef of that class, there of one loss over all layers, here of each layer's."
)


def granite_moe_hybrid(
    *,
    d_model: int,
    vocab_size: int,
    num_layers: int,
    attention_layers: Collection[int],
    num_heads: int,
    num_kv_heads: int,
    mamba_headdim: int,
    d_state: int,
    intermediate_size: int,
    shared_intermediate_size: int,
    num_experts: int,
    top_k: int,
    attention_multiplier: float,
    logits_scaling: float,
    residual_multiplier: float = 0.22,
    embedding_multiplier: float = 12.0,
    norm_eps: float = 1e-5,
    chunk_size: int = 256,
) -> Layout:
    """Mamba-2, seldom attention without positions, experts and a shared expert after each; tied."""
    mamba = Block(
        layer="mamba2",
        config={
            "d_state": d_state,
            "headdim": mamba_headdim,
            "n_groups": 1,
            "chunk_size": chunk_size,
            "norm_eps": norm_eps,
        },
    )
    attention = Block(
        layer="attention",
        config={
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "position": "none",
            "scale": attention_multiplier,
        },
    )
    experts = Block(
        layer="moe",
        config={
            "num_experts": num_experts,
            "top_k": top_k,
            "intermediate_size": intermediate_size,
            "shared_intermediate_size": shared_intermediate_size,
            "router": "topk_softmax",
            "aux_loss_weight": 0.001,
        },
    )
    mixers = interspersed(num_layers, mamba, attention, attention_layers)
    return Layout(
        d_model=d_model,
        vocab_size=vocab_size,
        blocks=interleave(mixers, experts),
        norm_eps=norm_eps,
        embedding_multiplier=embedding_multiplier,
        residual_multiplier=residual_multiplier,
        logits_scaling=logits_scaling,
    )


GRANITE_OPEN = (
    "Widths, heads, experts and their number are the model card's; the attention layers' places, "
    "vocabulary and head width of Mamba-2 are from copies of the hub's config.json. Not verified "
    "against it: attention_multiplier (one over the head width), residual_multiplier 0.22, "
    "logits_scaling (d_model / 256) and the norm epsilon 1e-5, which follow the family's other "
    "members; none of them changes a count. The weight of the load-balance loss is transformers' "
    "default."
)


def presets() -> dict[str, Preset]:
    """Every preset, by name."""
    return {
        "jamba-v0.1": Preset(
            layout=partial(
                jamba,
                d_model=4096,
                vocab_size=65_536,
                num_layers=32,
                attention_period=8,
                attention_offset=4,
                expert_period=2,
                expert_offset=1,
                num_heads=32,
                num_kv_heads=8,
                intermediate_size=14_336,
                num_experts=16,
                top_k=2,
            ),
            source="Lieber et al., arXiv:2403.19887; ai21labs/Jamba-v0.1",
            stated_parameters="52B total, 12B active",
            assumptions=JAMBA_OPEN,
        ),
        **_granite_presets(),
    }


def _granite_presets() -> dict[str, Preset]:
    common = partial(
        granite_moe_hybrid,
        vocab_size=100_352,
        num_layers=40,
        attention_layers=(5, 15, 25, 35),
        mamba_headdim=64,
        d_state=128,
        attention_multiplier=1 / 128,
    )
    return {
        "granite-4.0-h-tiny": Preset(
            layout=partial(
                common,
                d_model=1536,
                num_heads=12,
                num_kv_heads=4,
                intermediate_size=512,
                shared_intermediate_size=1024,
                num_experts=64,
                top_k=6,
                logits_scaling=6.0,
            ),
            source="ibm-granite/granite-4.0-h-tiny, model card",
            stated_parameters="7B total, 1B active",
            assumptions=GRANITE_OPEN,
        ),
        "granite-4.0-h-small": Preset(
            layout=partial(
                common,
                d_model=4096,
                num_heads=32,
                num_kv_heads=8,
                intermediate_size=768,
                shared_intermediate_size=1536,
                num_experts=72,
                top_k=10,
                logits_scaling=16.0,
            ),
            source="ibm-granite/granite-4.0-h-small, model card",
            stated_parameters="32B total, 9B active",
            assumptions=GRANITE_OPEN,
        ),
    }


@hookimpl
def register_presets(register: Register[Preset]) -> None:
    for name, preset in presets().items():
        register(name, preset)
