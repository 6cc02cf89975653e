"""A found pattern at another depth: split into layers, tiled or stretched. No torch.

A layer here is a mixer with the MLPs that follow it, so that a pair stays a pair at every depth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from workbench.layout import Block

Kinds = tuple[int, ...]  # which kind of layer, from the input up


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A layout's blocks as layers.

    Attributes:
        layers: each different layer once, as its blocks.
        kinds: for each layer from the input up its index in `layers`.
    """

    layers: tuple[tuple[Block, ...], ...]
    kinds: Kinds

    @classmethod
    def of(cls, blocks: Sequence[Block], is_mlp: Callable[[str], bool]) -> Pattern:
        """The layers of a flat sequence; MLPs before the first mixer belong to its layer."""
        layers: list[list[Block]] = [[]]
        for block in blocks:
            opened = any(not is_mlp(part.layer) for part in layers[-1])
            if opened and not is_mlp(block.layer):
                layers.append([])
            layers[-1].append(block)
        known = dict.fromkeys(map(tuple, layers))
        index = {layer: number for number, layer in enumerate(known)}
        return cls(tuple(known), tuple(index[tuple(layer)] for layer in layers))


def period(kinds: Kinds) -> int | None:
    """Layers after which a pattern repeats, if it holds its tile at least twice; else None.

    The last tile may be cut short.
    """
    for size in range(1, len(kinds) // 2 + 1):
        if all(kind == kinds[index % size] for index, kind in enumerate(kinds)):
            return size
    return None


def tiled(kinds: Kinds, num_layers: int) -> Kinds | None:
    """A repeating pattern continued to another depth; None if it does not repeat or fit."""
    size = period(kinds)
    if size is None or size > num_layers:
        return None
    return tuple(kinds[index % size] for index in range(num_layers))


def stretched(kinds: Kinds, num_layers: int) -> Kinds:
    """The pattern drawn out (or pressed together) to `num_layers`.

    Up to any relative depth, each kind has as many layers as its share in the original up to
    there, to within one layer. This is the chairman assignment of R. Tijdeman (Discrete
    Mathematics 32, 1980): of the kinds that are due, the one that must be placed soonest.
    """
    names = sorted(set(kinds))
    if len(names) == 1:
        return (names[0],) * num_layers
    due = {name: _due(kinds, name, num_layers) for name in names}
    slack = 2 * len(names) - 2
    placed = dict.fromkeys(names, 0)
    result = []
    for index in range(num_layers):
        open_ones = [
            name
            for name in names
            if slack * (due[name][index + 1] - placed[name] * len(kinds)) >= len(kinds)
        ]
        here = kinds[(2 * index + 1) * len(kinds) // (2 * num_layers)]
        # Of equally urgent ones, what the original has at this height.
        chosen = min(
            open_ones,
            key=lambda name: (
                _deadline(due[name], placed[name], len(kinds), slack), name != here
            ),
        )  # fmt: skip
        placed[chosen] += 1
        result.append(chosen)
    return tuple(result)


def _due(kinds: Kinds, name: int, num_layers: int) -> list[int]:
    """`len(kinds)` times the layers of `name` that the first 0, 1, 2, … new ones should hold."""
    before = [0]
    for kind in kinds:
        before.append(before[-1] + (kind == name))
    due = []
    for index in range(num_layers + 1):
        whole, rest = divmod(index * len(kinds), num_layers)
        part = rest if rest and kinds[whole] == name else 0
        due.append(before[whole] * num_layers + part)
    return due


def _deadline(due: Sequence[int], placed: int, unit: int, slack: int) -> int:
    """The first new layer after which waiting would be off by too much."""
    for index, value in enumerate(due):
        if slack * (value - placed * unit) > (slack - 1) * unit:
            return index
    return len(due)
