"""Exact hypervolume: how much of a space a set of points dominates. No numpy.

Everything is minimized, as in `pareto`. Optuna has this only in private modules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from workbench.errors import WorkbenchError
from workbench.pareto import pareto_front

Point = tuple[float, ...]


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """The volume between `reference` and the points: of what at least one of them dominates.

    Exact, by exclusive volumes (While, Bradstreet and Barone, "A fast way of calculating exact
    hypervolumes", 2012). Two objectives take a sort; with more its time may grow exponentially
    with their number: 100 points on a front of four are a matter of seconds.

    Args:
        points: `[n, k]`, every column minimized. What is not better than the reference in every
            column, or holds a NaN, adds nothing.
        reference: `[k]`, k at least 1.

    Raises:
        WorkbenchError: the reference is empty or not finite, or a point is infinitely good.
    """
    if not reference or not all(map(math.isfinite, reference)):
        raise WorkbenchError(
            f"a hypervolume needs a reference point of finite numbers, got {list(reference)}"
        )
    inside = {
        tuple(map(float, point))
        for point in points
        if all(value < limit for value, limit in zip(point, reference, strict=True))
    }
    if any(map(math.isinf, (value for point in inside for value in point))):
        raise WorkbenchError("a hypervolume needs finite points: one of them holds -inf")
    return _volume(_front(inside), tuple(map(float, reference)))


def _front(points: set[Point]) -> list[Point]:
    """The distinct points that no other dominates, worst in the last column first."""
    distinct = list(points)
    front = [distinct[index] for index in pareto_front(distinct)]
    return sorted(front, key=lambda point: point[::-1], reverse=True)


def _volume(front: list[Point], reference: Point) -> float:
    if not front:
        return 0.0
    if len(reference) == 1:
        return reference[0] - front[0][0]
    if len(reference) == 2:
        return _area(front, reference)
    # What a point dominates and no later one does. Later ones are better in the last column, so
    # what they share with it differs in the other columns alone.
    return sum(
        _box(point, reference) - _volume(_shared(point, front[index + 1 :]), reference)
        for index, point in enumerate(front)
    )


def _area(front: list[Point], reference: Point) -> float:
    """Of a front in two columns that is sorted by the second, descending: a strip a point."""
    area, ceiling = 0.0, reference[1]
    for first, second in front:
        area += (reference[0] - first) * (ceiling - second)
        ceiling = second
    return area


def _box(point: Point, reference: Point) -> float:
    return math.prod(limit - value for value, limit in zip(point, reference, strict=True))


def _shared(point: Point, others: list[Point]) -> list[Point]:
    """The front of what the others dominate of a point's box."""
    return _front({tuple(map(max, point, other)) for other in others})
