"""Patterns at another depth: shares and places, for any pattern and depth."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from workbench.layout import Block
from workbench.scaling_pattern import Pattern, period, stretched, tiled


def random_pattern(rng: random.Random) -> tuple[int, ...]:
    kinds = rng.randint(1, 4)
    return tuple(rng.randrange(kinds) for _ in range(rng.randint(1, 12)))


def share_up_to(kinds: tuple[int, ...], kind: int, height: Fraction) -> Fraction:
    """How many layers of a kind lie below a height of 0 to 1, as a share of all."""
    position = height * len(kinds)
    whole = int(position)
    below = Fraction(kinds[:whole].count(kind))
    if whole < len(kinds) and kinds[whole] == kind:
        below += position - whole
    return below / len(kinds)


@pytest.mark.parametrize("seed", range(40))
def test_stretching_keeps_shares_and_places_to_within_one_layer(seed: int) -> None:
    rng = random.Random(seed)
    kinds = random_pattern(rng)
    depth = rng.randint(1, 60)
    made = stretched(kinds, depth)
    assert len(made) == depth
    for kind in set(kinds):
        for index in range(depth + 1):
            wanted = depth * share_up_to(kinds, kind, Fraction(index, depth))
            assert abs(made[:index].count(kind) - wanted) <= 1


@pytest.mark.parametrize("seed", range(20))
def test_stretching_to_the_same_depth_or_a_multiple_is_exact(seed: int) -> None:
    kinds = random_pattern(random.Random(seed))
    assert stretched(kinds, len(kinds)) == kinds
    assert stretched(kinds, 5 * len(kinds)) == tuple(k for k in kinds for _ in range(5))


def test_a_tie_is_what_the_original_has_there() -> None:
    """Half of an odd depth each: the layer in the middle is one of the two, the last is not."""
    assert stretched((0, 1), 9) in [(0,) * 4 + (1,) * 5, (0,) * 5 + (1,) * 4]


def test_repeating_patterns_are_continued() -> None:
    assert period((0, 1, 0, 1, 0)) == 2
    assert tiled((0, 1, 0, 1, 0), 8) == (0, 1, 0, 1, 0, 1, 0, 1)
    assert tiled((3, 3), 4) == (3, 3, 3, 3)
    assert tiled((0, 1, 1, 0), 12) is None  # a sandwich has no tile
    assert tiled((0, 1, 2, 0, 1, 2), 2) is None  # too short for one tile


def test_a_layer_is_a_mixer_with_the_mlps_after_it() -> None:
    def block(name: str, **config: object) -> Block:
        return Block(layer=name, config=dict(config))

    blocks = [block("-"), block("m"), block("-"), block("a"), block("m"), block("-", wide=True)]
    pattern = Pattern.of(blocks, lambda name: name == "-")
    assert [[part.layer for part in layer] for layer in pattern.layers] == [
        ["-", "m", "-"], ["a"], ["m", "-"]
    ]  # fmt: skip
    assert pattern.kinds == (0, 1, 2)
    assert tuple(part for kind in pattern.kinds for part in pattern.layers[kind]) == tuple(blocks)
