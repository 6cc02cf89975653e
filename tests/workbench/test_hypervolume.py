"""Hypervolume: known values, and what must hold of every set of points."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench import WorkbenchError
from workbench.hypervolume import hypervolume
from workbench.pareto import pareto_front

CELLS = 4


@st.composite
def clouds(draw, size=7):
    k = draw(st.integers(1, 4))
    point = st.tuples(*[st.integers(0, CELLS + 1)] * k)
    return k, draw(st.lists(point, max_size=size))


def counted(points, k):
    """Unit cells below (CELLS, …, CELLS) that some point dominates: the definition."""
    corners = itertools.product(range(CELLS), repeat=k)
    return sum(any(all(a <= b for a, b in zip(p, c, strict=True)) for p in points) for c in corners)


@given(clouds())
def test_it_is_the_count_of_dominated_cells(cloud):
    k, points = cloud
    assert hypervolume(points, [CELLS] * k) == counted(points, k)


@given(clouds(), st.randoms())
def test_order_dominated_points_and_repetitions_add_nothing(cloud, random):
    k, points = cloud
    reference = [CELLS] * k
    whole = hypervolume(points, reference)
    shuffled = random.sample(points * 2, 2 * len(points))
    assert hypervolume(shuffled, reference) == whole
    assert hypervolume([points[i] for i in pareto_front(points)], reference) == whole


@given(clouds(), st.permutations(range(4)))
def test_the_order_of_objectives_does_not_matter(cloud, order):
    k, points = cloud
    columns = [column for column in order if column < k]
    moved = [[point[column] for column in columns] for point in points]
    assert hypervolume(moved, [CELLS] * k) == hypervolume(points, [CELLS] * k)


@given(clouds(size=14), st.integers(0, 14))
def test_a_union_is_at_least_each_part_and_at_most_their_sum(cloud, cut):
    k, points = cloud
    reference = [CELLS] * k
    parts = [hypervolume(part, reference) for part in (points[:cut], points[cut:])]
    assert max(parts) <= hypervolume(points, reference) <= sum(parts)


@given(clouds(), st.floats(0.01, 100), st.floats(-50, 50))
def test_scale_and_shift(cloud, scale, shift):
    k, points = cloud
    moved = [[value * scale + shift for value in point] for point in points]
    found = hypervolume(moved, [CELLS * scale + shift] * k)
    assert math.isclose(found, counted(points, k) * scale**k, rel_tol=1e-9, abs_tol=1e-9)


def test_known_values():
    assert hypervolume([], [1.0]) == 0
    assert hypervolume([[3.0], [1.0]], [4.0]) == 3
    assert hypervolume([[1, 3], [2, 2], [3, 1]], [4, 4]) == 6
    # Three boxes of 2 x 1 x 1 along the axes share the unit cube at the corner.
    assert hypervolume([[0, 1, 1], [1, 0, 1], [1, 1, 0]], [2, 2, 2]) == 4
    # A simplex front's hypervolume tends to what lies above the simplex.
    n = 12
    front = [(i / n, j / n, 1 - (i + j) / n) for i in range(n + 1) for j in range(n + 1 - i)]
    cells = sum(1 for c in itertools.product(range(n), repeat=3) if sum(c) >= n) / n**3
    assert math.isclose(hypervolume(front, [1, 1, 1]), cells)


def test_what_does_not_count():
    assert hypervolume([[0, 4], [4, 0], [math.nan, 0], [0, math.inf]], [4, 4]) == 0


@pytest.mark.parametrize(
    ("points", "reference", "words"),
    [
        ([], [], "finite numbers"),
        ([[0.0]], [math.inf], "finite numbers"),
        ([[-math.inf, 0.0]], [1.0, 1.0], "-inf"),
    ],
)
def test_refusals(points, reference, words):
    with pytest.raises(WorkbenchError, match=words):
        hypervolume(points, reference)
