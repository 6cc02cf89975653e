"""Pareto fronts. Everything is minimized; negate what is to be maximized."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the points that no other point dominates, in their order.

    A point dominates another if it is nowhere worse and somewhere better; of equal points all
    stay. A point with a NaN is never on the front.

    Args:
        points: `[n, k]`, every column minimized.
    """
    if not points:
        return []
    values = np.asarray(points, dtype=float)
    kept = []
    for index, point in enumerate(values):
        if np.isnan(point).any():
            continue
        no_worse = (values <= point).all(axis=1)
        better = (values < point).any(axis=1)
        if not (no_worse & better).any():
            kept.append(index)
    return kept
