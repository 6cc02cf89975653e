"""Pareto fronts. Everything is minimized; negate what is to be maximized. No numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the points that no other point dominates, in their order.

    A point dominates another if it is nowhere worse and somewhere better; of equal points all
    stay. A point with a NaN is never on the front.

    Args:
        points: `[n, k]`, every column minimized.
    """
    order = [i for i, point in enumerate(points) if not any(map(math.isnan, point))]
    # What dominates a point precedes it in lexicographic order, so the front so far decides.
    order.sort(key=lambda index: tuple(points[index]))
    front: list[int] = []
    for index in order:
        if not any(_dominates(points[other], points[index]) for other in front):
            front.append(index)
    return sorted(front)


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    no_worse = all(a <= b for a, b in zip(one, other, strict=True))
    return no_worse and any(a < b for a, b in zip(one, other, strict=True))
