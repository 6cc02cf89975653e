"""How far two lists agree on an order. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's tau-b of two lists: 1 for the same order, -1 for the opposite; ties are allowed.

    None where a list has no order: fewer than two values, or all equal.
    """
    pairs = [
        (_sign(a - c), _sign(b - d))
        for (a, b), (c, d) in itertools.combinations(zip(first, second, strict=True), 2)
    ]
    ordered = [sum(pair[side] != 0 for pair in pairs) for side in (0, 1)]
    if 0 in ordered:
        return None
    return float(sum(a * b for a, b in pairs) / (ordered[0] * ordered[1]) ** 0.5)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
