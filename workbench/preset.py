"""Preset: a named Layout of a known system, with what its document claims beside it. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from workbench.errors import FieldError
from workbench.layout import Block, Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A known system as a Layout.

    Attributes:
        layout: makes the Layout; called when it is asked for.
        source: the document or repository that its figures come from.
        stated_parameters: the parameter count that this document states, as it words it
            (`"~2.1B"`); a claim, never mixed with the exact count. None where it states none.
        assumptions: what the document leaves open and how it was filled in.
    """

    layout: Callable[[], Layout]
    source: str
    stated_parameters: str | None = None
    assumptions: str = ""


def interleave(mixers: Iterable[Block], mlps: Block | Iterable[Block]) -> tuple[Block, ...]:
    """A mixer and an MLP by turns, from the input up: the blocks of most published decoders.

    Args:
        mlps: the one after every mixer, or one for each.

    Raises:
        FieldError: there are not as many MLPs as mixers.
    """
    mixers = tuple(mixers)
    mlps = (mlps,) * len(mixers) if isinstance(mlps, Block) else tuple(mlps)
    if len(mixers) != len(mlps):
        raise FieldError("mlps", f"{len(mlps)} for {len(mixers)} mixers: give one for each")
    return tuple(block for pair in zip(mixers, mlps, strict=True) for block in pair)


def interspersed(
    num_layers: int, common: Block, rare: Block, at: Iterable[int]
) -> tuple[Block, ...]:
    """`rare` in the layers of the given indices, counted from 0, `common` in all others.

    Raises:
        FieldError: an index that no layer has.
    """
    indices = set(at)
    for index in sorted(indices):
        if not 0 <= index < num_layers:
            raise FieldError("at", f"{index} is no layer's index: the last is {num_layers - 1}")
    return tuple(rare if index in indices else common for index in range(num_layers))
