"""Pareto fronts, against the definition."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from workbench.pareto import pareto_front

VALUES = st.integers(0, 4).map(float)
POINTS = st.integers(1, 4).flatmap(
    lambda k: st.lists(st.lists(VALUES, min_size=k, max_size=k), max_size=25)
)


def dominates(a, b):
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


@given(POINTS)
def test_the_front_is_what_nothing_dominates(points):
    wanted = [i for i, p in enumerate(points) if not any(dominates(q, p) for q in points)]
    assert pareto_front(points) == wanted


def test_nan_is_never_on_the_front():
    assert pareto_front([[1.0, math.nan], [2.0, 2.0], [math.nan, math.nan]]) == [1]


def test_no_points_no_front():
    assert pareto_front([]) == []
