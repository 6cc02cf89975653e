"""Falcon-H1 as presets: Zuo et al., arXiv:2507.22448. Plain data, no torch.

The multipliers are those of maximal update parametrization: a figure of the smallest checkpoint
times powers of the widths. The published configurations of 0.5B, 1.5B-Deep, 7B and 34B follow the
powers written here in every multiplier.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from workbench.hookspecs import Register, hookimpl
from workbench.layout import Block, Layout
from workbench.preset import Preset


def multipliers(
    *,
    d_model: int,
    attention_width: int,
    head_dim: int,
    d_ssm: int,
    d_state: int,
    intermediate_size: int,
) -> dict[str, Any]:
    """Falcon-H1's multipliers at these widths, by their published names.

    Args:
        attention_width: query heads times their channels.
        d_ssm: SSM heads times their channels.
    """
    narrow = 1024 / d_model
    root = math.sqrt(2)
    return {
        "embedding_multiplier": 4 * root,
        "lm_head_multiplier": 0.0390625 * narrow,
        "key_multiplier": 0.390625 * narrow**2 * math.sqrt(64 / head_dim),
        "attention_in_multiplier": 1.0,
        "attention_out_multiplier": 0.9375 * narrow * 512 / attention_width,
        "ssm_in_multiplier": 1.25 * narrow,
        "ssm_out_multiplier": root / 6 * 1536 / d_ssm,
        "ssm_multipliers": [root / 4, 0.25, root / 4 * 128 / d_state, 0.5, root / 4],
        "mlp_multipliers": [root / 1.6 * narrow, 0.5859375 * narrow * 2048 / intermediate_size],
    }


def falcon_h1(
    *,
    d_model: int,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    ssm_heads: int,
    headdim: int,
    d_state: int,
    ssm_norm: bool,
    intermediate_size: int,
) -> Layout:
    """Attention beside Mamba-2, then SwiGLU, all with multipliers; untied."""
    scales = multipliers(
        d_model=d_model,
        attention_width=num_heads * head_dim,
        head_dim=head_dim,
        d_ssm=ssm_heads * headdim,
        d_state=d_state,
        intermediate_size=intermediate_size,
    )
    embedding, head = scales.pop("embedding_multiplier"), scales.pop("lm_head_multiplier")
    gate, down = scales.pop("mlp_multipliers")
    mixer: dict[str, Any] = {
        "num_kv_heads": num_kv_heads,
        "queries_per_kv": num_heads // num_kv_heads,
        "head_dim": head_dim,
        "rope_theta": 1e11,
        "num_ssm_heads": ssm_heads,
        "headdim": headdim,
        "d_state": d_state,
        "n_groups": 1,
        "chunk_size": 128,
        "ssm_norm": ssm_norm,
        "norm_eps": 1e-5,
    }
    mlp = {
        "intermediate_size": intermediate_size,
        "gate_multiplier": gate,
        "down_multiplier": down,
    }
    return Layout(
        d_model=d_model,
        vocab_size=vocab_size,
        blocks=(
            Block(layer="parallel-hybrid", config=mixer | scales),
            Block(layer="scaled-swiglu", config=mlp),
        )
        * num_layers,
        tie_embeddings=False,
        norm_eps=1e-5,
        embedding_multiplier=embedding,
        logits_scaling=1 / head,
    )


FALCON_H1_1_5B_OPEN = (
    "config.json itself could not be read. Shapes, vocabulary, norms, lm_head_multiplier and "
    "embedding_multiplier are from published readings of it, and the count is the checkpoint's. "
    "Not verified: the attention, key, SSM and MLP multipliers, which follow from the widths by "
    "the powers that the configurations of 0.5B, 1.5B-Deep, 7B and 34B obey, as does this one's "
    "lm_head_multiplier."
)
FALCON_H1_0_5B_OPEN = "From a copy of the checkpoint's config.json, every figure."


def presets() -> dict[str, Preset]:
    """Two of the family, by name."""
    return {
        "falcon-h1-0.5b": Preset(
            layout=partial(
                falcon_h1,
                d_model=1024,
                vocab_size=32_784,
                num_layers=36,
                num_heads=8,
                num_kv_heads=2,
                head_dim=64,
                ssm_heads=24,
                headdim=64,
                d_state=128,
                ssm_norm=False,
                intermediate_size=2048,
            ),
            source="arXiv:2507.22448; tiiuae/Falcon-H1-0.5B-Base, config",
            stated_parameters="0.5B",
            assumptions=FALCON_H1_0_5B_OPEN,
        ),
        "falcon-h1-1.5b": Preset(
            layout=partial(
                falcon_h1,
                d_model=2048,
                vocab_size=65_537,
                num_layers=24,
                num_heads=8,
                num_kv_heads=2,
                head_dim=128,
                ssm_heads=48,
                headdim=64,
                d_state=256,
                ssm_norm=True,
                intermediate_size=4608,
            ),
            source="arXiv:2507.22448; tiiuae/Falcon-H1-1.5B-Base, model card and config",
            stated_parameters="1.5B",
            assumptions=FALCON_H1_1_5B_OPEN,
        ),
    }


@hookimpl
def register_presets(register: Register[Preset]) -> None:
    for name, preset in presets().items():
        register(name, preset)
