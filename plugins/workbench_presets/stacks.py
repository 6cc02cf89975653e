"""Building blocks of presets: a flat sequence of mixers, each perhaps followed by an MLP."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from workbench.layout import Block


def interleave(mixers: Iterable[Block], mlp: Block) -> tuple[Block, ...]:
    """`mlp` after every mixer."""
    return tuple(block for mixer in mixers for block in (mixer, mlp))


def substitute(names: Iterable[str], blocks: Mapping[str, tuple[Block, ...]]) -> tuple[Block, ...]:
    """The blocks that each placed name stands for, in order."""
    return tuple(block for name in names for block in blocks[name])
