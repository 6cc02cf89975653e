"""Building blocks of presets: a flat sequence of mixers, each perhaps followed by an MLP."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from workbench.layout import Block


def swiglu(intermediate_size: int) -> Block:
    """A SwiGLU of a stated width."""
    return Block(layer="swiglu", config={"intermediate_size": intermediate_size})


def interleave(mixers: Iterable[Block], mlp: Block) -> tuple[Block, ...]:
    """`mlp` after every mixer."""
    return tuple(block for mixer in mixers for block in (mixer, mlp))


def substitute(names: Iterable[str], blocks: Mapping[str, tuple[Block, ...]]) -> tuple[Block, ...]:
    """The blocks that each placed name stands for, in order."""
    return tuple(block for name in names for block in blocks[name])


def mixers(
    num_layers: int, attention_layers: Collection[int], mamba: Block, attention: Block
) -> list[Block]:
    """`mamba` in every layer but those of the given indices, which hold `attention`."""
    return [attention if index in attention_layers else mamba for index in range(num_layers)]
