"""Published hybrids of Mamba and attention, by hyper-parameters of their checkpoints.

A family is one function of the sizes that its members, or small copies in tests, differ in; what
they have in common stands in the function. `published_configs.json` holds the same models as the
hub's config.json gives them.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from workbench.layout import Block, Layout
from workbench.preset import Preset, interspersed
from workbench_presets.stacks import mamba2, substitute, with_swiglu


def bamba(
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
) -> Layout:
    """Mamba-2, seldom attention that turns half of each head, SwiGLU after every mixer; untied."""
    attention = Block(
        layer="attention",
        config={
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    )
    mamba = mamba2(d_state=d_state, headdim=mamba_headdim)
    mixers = interspersed(num_layers, mamba, attention, attention_layers)
    return Layout(
        d_model=d_model,
        vocab_size=vocab_size,
        blocks=with_swiglu(mixers, intermediate_size),
        tie_embeddings=False,
        norm_eps=1e-5,
    )


BAMBA_OPEN = (
    "The model card states layers, width, heads and untied embeddings; the rest is from a copy of "
    "the hub's config.json trimmed to what shapes the model, and from a small random model made "
    "from it. RoPE turns half of each head, as transformers' class does whatever a config says."
)


def nemotron_h(
    *,
    d_model: int,
    vocab_size: int,
    pattern: str,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    mamba_heads: int,
    mamba_headdim: int,
    n_groups: int,
    d_state: int,
    intermediate_size: int,
) -> Layout:
    """One layer a block, as the pattern says: M Mamba-2, * attention without positions, - MLP."""
    mamba = Block(
        layer="mamba2",
        config={
            "d_state": d_state,
            "headdim": mamba_headdim,
            "num_heads": mamba_heads,
            "n_groups": n_groups,
            "chunk_size": 128,
        },
    )
    attention = Block(
        layer="attention",
        config={
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "position": "none",
        },
    )
    mlp = Block(layer="relu2_mlp", config={"intermediate_size": intermediate_size})
    return Layout(
        d_model=d_model,
        vocab_size=vocab_size,
        blocks=substitute(pattern, {"M": (mamba,), "*": (attention,), "-": (mlp,)}),
        tie_embeddings=False,
        norm_eps=1e-5,
    )


NEMOTRON_H_OPEN = (
    "Sizes and pattern are those of NVIDIA's training recipe and of a trimmed copy of the hub's "
    "config.json; the norm's epsilon is transformers' default. Step sizes have no limit, as in the "
    "checkpoint's own code; transformers' class clamps them at 0.001 or above in prefill, though "
    "not in decoding (dt_limit_min = 0.001 says the former)."
)


def samba() -> Layout:
    """Mamba and sliding-window attention by turns, a SwiGLU after every mixer; tied."""
    mamba = Block(layer="mamba", config={"d_state": 16, "d_conv": 4, "expand": 2})
    attention = Block(
        layer="attention",
        config={"num_heads": 12, "rope_theta": 10000.0, "sliding_window": 2048},
    )
    return Layout(
        d_model=1536,
        vocab_size=32_000,
        blocks=with_swiglu([mamba, attention] * 6, 4096),
        norm_eps=1e-5,
    )


SAMBA_OPEN = (
    "From the configuration named Samba_421M of its repository (lit_gpt/config.py) and the code "
    "that reads it: a token sees itself and the 2,047 before it, embeddings are tied. transformers "
    "has no such class: the count has the paper's figure alone to stand against."
)

NEMOTRON_H_8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"


def presets() -> dict[str, Preset]:
    """Every hybrid, by name."""
    return {
        "bamba-9b": Preset(
            layout=partial(
                bamba,
                d_model=4096,
                vocab_size=128_256,
                num_layers=32,
                attention_layers=(9, 18, 27),
                num_heads=32,
                num_kv_heads=8,
                mamba_headdim=64,
                d_state=128,
                intermediate_size=14_336,
            ),
            source="ibm-ai-platform/Bamba-9B-v1 (formerly ibm-fms/Bamba-9B), model card and config",
            stated_parameters="9.78B",
            assumptions=BAMBA_OPEN,
        ),
        "nemotron-h-8b": Preset(
            layout=partial(
                nemotron_h,
                d_model=4096,
                vocab_size=131_072,
                pattern=NEMOTRON_H_8B,
                num_heads=32,
                num_kv_heads=8,
                head_dim=128,
                mamba_heads=128,
                mamba_headdim=64,
                n_groups=8,
                d_state=128,
                intermediate_size=21_504,
            ),
            source="arXiv:2504.03624; nvidia/Nemotron-H-8B-Base-8K",
            stated_parameters="8B",
            assumptions=NEMOTRON_H_OPEN,
        ),
        "samba-421m": Preset(
            layout=samba,
            source="Ren et al., arXiv:2406.07522; microsoft/Samba",
            stated_parameters="421M",
            assumptions=SAMBA_OPEN,
        ),
    }
