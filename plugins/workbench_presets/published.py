"""Mamba and Mamba-2 as their authors published them, by hyper-parameters of their checkpoints."""

from __future__ import annotations

from functools import partial

from workbench.layout import Block, Layout
from workbench.preset import Preset

# name → d_model, number of layers
MAMBA = {
    "130m": (768, 24),
    "370m": (1024, 48),
    "790m": (1536, 48),
    "1.4b": (2048, 48),
    "2.8b": (2560, 64),
}
MAMBA2 = {
    "130m": (768, 24),
    "370m": (1024, 48),
    "780m": (1536, 48),
    "1.3b": (2048, 48),
    "2.7b": (2560, 64),
}

# The GPT-NeoX tokenizer's 50,277 tokens, padded to a multiple of 8 (Mamba) and 16 (Mamba-2).
MAMBA_VOCAB = 50280
MAMBA2_VOCAB = 50288


def mamba(d_model: int, num_layers: int) -> Layout:
    """A Mamba language model: nothing but Mamba blocks, tied, RMSNorm."""
    block = Block(layer="mamba", config={"d_state": 16, "d_conv": 4, "expand": 2})
    return Layout(
        d_model=d_model,
        vocab_size=MAMBA_VOCAB,
        blocks=(block,) * num_layers,
        norm_eps=1e-5,
    )


def mamba2(d_model: int, num_layers: int) -> Layout:
    """A Mamba-2 language model: nothing but Mamba-2 blocks, tied, RMSNorm."""
    config = {"d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "n_groups": 1}
    block = Block(layer="mamba2", config={**config, "chunk_size": 256})
    return Layout(
        d_model=d_model,
        vocab_size=MAMBA2_VOCAB,
        blocks=(block,) * num_layers,
        norm_eps=1e-5,
    )


def presets() -> dict[str, Preset]:
    """Every published size, by name."""
    mambas = {
        f"mamba-{size}": Preset(
            layout=partial(mamba, *shape),
            source="Gu and Dao, arXiv:2312.00752; state-spaces/mamba",
            stated_parameters=size.upper(),
        )
        for size, shape in MAMBA.items()
    }
    mamba2s = {
        f"mamba2-{size}": Preset(
            layout=partial(mamba2, *shape),
            source="Dao and Gu, arXiv:2405.21060; state-spaces/mamba",
            stated_parameters=size.upper(),
        )
        for size, shape in MAMBA2.items()
    }
    return {**mambas, **mamba2s}
