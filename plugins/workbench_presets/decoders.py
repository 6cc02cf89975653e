"""Published decoders of attention alone, for comparison: TinyLlama and two Qwen3.

`published_configs.json` holds the same models as the hub's config.json gives them.
"""

from __future__ import annotations

from functools import partial

from workbench.layout import Block, Layout
from workbench.preset import Preset
from workbench_presets.stacks import with_swiglu


def llama(
    *,
    d_model: int,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    intermediate_size: int,
) -> Layout:
    """Llama 2 with grouped queries: RoPE, SwiGLU, untied."""
    attention = Block(
        layer="attention",
        config={"num_heads": num_heads, "num_kv_heads": num_kv_heads, "rope_theta": 10000.0},
    )
    return Layout(
        d_model=d_model,
        vocab_size=vocab_size,
        blocks=with_swiglu([attention] * num_layers, intermediate_size),
        tie_embeddings=False,
        norm_eps=1e-5,
    )


def qwen3(
    *,
    d_model: int,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    intermediate_size: int,
) -> Layout:
    """Qwen3's small dense models: normed queries and keys, wide heads, RoPE of base 1e6; tied."""
    attention = Block(
        layer="attention",
        config={
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "rope_theta": 1e6,
            "qk_norm": True,
            "norm_eps": 1e-6,
        },
    )
    return Layout(
        d_model=d_model,
        vocab_size=vocab_size,
        blocks=with_swiglu([attention] * num_layers, intermediate_size),
        norm_eps=1e-6,
    )


# name → stated parameters, d_model, intermediate_size
QWEN3 = {"0.6b": ("0.6B", 1024, 3072), "1.7b": ("1.7B", 2048, 6144)}


def presets() -> dict[str, Preset]:
    """Every decoder, by name."""
    tinyllama = Preset(
        layout=partial(
            llama,
            d_model=2048,
            vocab_size=32_000,
            num_layers=22,
            num_heads=32,
            num_kv_heads=4,
            intermediate_size=5632,
        ),
        source="Zhang et al., arXiv:2401.02385; TinyLlama/TinyLlama-1.1B, config",
        stated_parameters="1.1B",
    )
    qwen3s = {
        f"qwen3-{size}": Preset(
            layout=partial(
                qwen3,
                d_model=d_model,
                vocab_size=151_936,
                num_layers=28,
                num_heads=16,
                num_kv_heads=8,
                head_dim=128,
                intermediate_size=intermediate_size,
            ),
            source=f"arXiv:2505.09388; Qwen/Qwen3-{size.upper()}, model card and config",
            stated_parameters=stated,
        )
        for size, (stated, d_model, intermediate_size) in QWEN3.items()
    }
    return {"tinyllama-1.1b": tinyllama, **qwen3s}
