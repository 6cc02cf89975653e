"""A block at another d_model: what its Config derives follows by itself, what it fixes is scaled.

Head dims, state sizes, numbers of experts and all other fields stay. A Config that leaves a
number of heads or an inner width open derives it from d_model. One that fixes it says what it is
by the field's name, as every layer here has it:

| field | at another d_model |
|---|---|
| `num_…heads` | grown by the same factor, which must give whole heads |
| `…intermediate_size` | grown, a multiple of what the original is one of (at most 32) |
| `…rank`, `…rank_dim` | grown, rounded up |
"""

from __future__ import annotations

import math
from typing import Any

from workbench.errors import FieldError
from workbench.layout import Block

MULTIPLE = 32


def widened(block: Block, before: int, after: int) -> Block:
    """The block for `d_model = after` in place of `before`, its quantizer carried over.

    Raises:
        FieldError: a fixed number of heads does not grow to a whole number.
    """
    config = {
        name: _grown(name, value, before, after) if type(value) is int else value
        for name, value in block.config.items()
    }
    return Block(layer=block.layer, config=config, quantizer=block.quantizer)


def _grown(name: str, value: int, before: int, after: int) -> Any:
    if name.startswith("num_") and name.endswith("heads"):
        heads, rest = divmod(value * after, before)
        if rest or heads < 1:
            raise FieldError(
                name, f"{value} heads at d_model = {before} are no whole number at {after}"
            )
        return heads
    if name.endswith("intermediate_size"):
        multiple = math.gcd(value, MULTIPLE)
        return max(1, round(value * after / before / multiple)) * multiple
    if name.endswith(("rank", "rank_dim")):
        return -(-value * after // before)
    return value
