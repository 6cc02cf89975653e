"""The contract suite, and the paper's orderings."""

from __future__ import annotations

from pathlib import Path

import pytest
from lm_sandwich_placement import SandwichTransformer

from workbench.builder import Builder
from workbench.errors import FieldError
from workbench.testing import PlacementContract


def config(coefficient: int) -> SandwichTransformer.Config:
    return SandwichTransformer.Config(first="s", second="f", coefficient=coefficient)


def order(num_layers: int, coefficient: int) -> str:
    return "".join(SandwichTransformer.place(num_layers, ("s", "f"), config(coefficient)))


class TestSandwichTransformer(PlacementContract):
    placement = SandwichTransformer
    configs = tuple(
        SandwichTransformer.Config(first="attention", second="mamba", coefficient=coefficient)
        for coefficient in (0, 1, 6)
    )


def test_the_papers_formula() -> None:
    """s^k (s f)^(n - k) f^k, for every k of every n."""
    for n in range(1, 17):
        for k in range(n + 1):
            assert order(2 * n, k) == "s" * k + "sf" * (n - k) + "f" * k


def test_the_papers_best_of_sixteen_pairs() -> None:
    assert order(32, 6) == "ssssss" + "sf" * 10 + "ffffff"


def test_halves_are_equal_and_an_odd_layer_is_of_the_first() -> None:
    for depth in range(1, 33):
        for k in range(depth // 2 + 1):
            placed = order(depth, k)
            assert placed.count("s") - placed.count("f") == depth % 2


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(
        FieldError, match=r"coefficient: two ends of 3 .* depth of 5: use at most 2"
    ):
        order(5, 3)
    with pytest.raises(FieldError, match="second: 'f' is not offered: the mixers are s"):
        SandwichTransformer.place(4, ("s",), config(1))
    with pytest.raises(FieldError, match="coefficient: must be at least 0"):
        config(-1)


def test_it_is_found_beside_the_built_in_sandwich() -> None:
    placements = Builder.load([Path(__file__).parent]).placements
    assert placements["sandwich_transformer"].reference == SandwichTransformer.reference
    assert placements["sandwich"].reference != SandwichTransformer.reference
