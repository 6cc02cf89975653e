"""Building blocks of these presets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from workbench.layout import Block
from workbench.preset import interleave


def swiglu(intermediate_size: int) -> Block:
    """A SwiGLU of a stated width."""
    return Block(layer="swiglu", config={"intermediate_size": intermediate_size})


def mamba2(*, d_state: int, headdim: int) -> Block:
    """Mamba-2 as Bamba and the Granites have it: one group, chunks of 256 tokens."""
    config = {"d_state": d_state, "headdim": headdim, "n_groups": 1, "chunk_size": 256}
    return Block(layer="mamba2", config=config)


def with_swiglu(mixers: Iterable[Block], intermediate_size: int) -> tuple[Block, ...]:
    """The mixers, each followed by a SwiGLU of a stated width."""
    return interleave(mixers, swiglu(intermediate_size))


def substitute(names: Iterable[str], blocks: Mapping[str, tuple[Block, ...]]) -> tuple[Block, ...]:
    """The blocks that each placed name stands for, in order."""
    return tuple(block for name in names for block in blocks[name])
