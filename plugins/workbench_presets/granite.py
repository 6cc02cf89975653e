"""Granite 4.0 H without experts, by hyper-parameters of its checkpoints.

`published_configs.json` holds the same models as the hub's config.json gives them.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from workbench.layout import Block, Layout
from workbench.preset import Preset, interspersed
from workbench_presets.stacks import mamba2, with_swiglu


def granite_hybrid(
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
    attention_multiplier: float,
    residual_multiplier: float,
    logits_scaling: float,
) -> Layout:
    """Granite 4.0 H without experts: Mamba-2, four attentions without positions, SwiGLU; tied."""
    attention = Block(
        layer="attention",
        config={
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "position": "none",
            "scale": attention_multiplier,
        },
    )
    mamba = mamba2(d_state=d_state, headdim=mamba_headdim)
    mixers = interspersed(num_layers, mamba, attention, attention_layers)
    return Layout(
        d_model=d_model,
        vocab_size=vocab_size,
        blocks=with_swiglu(mixers, intermediate_size),
        norm_eps=1e-5,
        embedding_multiplier=12.0,
        residual_multiplier=residual_multiplier,
        logits_scaling=logits_scaling,
    )


GRANITE_350M_OPEN = (
    "From copies of the hub's config.json; the multipliers also stand in the published GGUF's "
    "metadata."
)
GRANITE_MICRO_OPEN = (
    "From the model card and a fine-tuned copy of the hub's config.json; the published GGUF's "
    "metadata give the same count. Not verified: residual_multiplier 0.22 and norm epsilon 1e-5, "
    "which are those of the family's other members."
)


def presets() -> dict[str, Preset]:
    """Both sizes, by name."""
    common = partial(granite_hybrid, vocab_size=100_352, d_state=128, attention_multiplier=1 / 64)
    return {
        "granite-4.0-h-350m": Preset(
            layout=partial(
                common,
                d_model=768,
                num_layers=32,
                attention_layers=(10, 13, 17, 27),
                num_heads=12,
                num_kv_heads=4,
                mamba_headdim=32,
                intermediate_size=2048,
                residual_multiplier=0.246,
                logits_scaling=3.0,
            ),
            source="ibm-granite/granite-4.0-h-350m, model card and config",
            stated_parameters="340M",
            assumptions=GRANITE_350M_OPEN,
        ),
        "granite-4.0-h-micro": Preset(
            layout=partial(
                common,
                d_model=2048,
                num_layers=40,
                attention_layers=(5, 15, 25, 35),
                num_heads=32,
                num_kv_heads=8,
                mamba_headdim=64,
                intermediate_size=8192,
                residual_multiplier=0.22,
                logits_scaling=8.0,
            ),
            source="ibm-granite/granite-4.0-h-micro, model card and config",
            stated_parameters="3B",
            assumptions=GRANITE_MICRO_OPEN,
        ),
    }
