"""Hypervolume regret: what share of the best possible a set of points still lacks. No numpy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from workbench.errors import WorkbenchError
from workbench.hypervolume import hypervolume
from workbench.pareto import pareto_front

MARGIN = 0.1  # of the front's extent: its ends count, points far off it do not


class Regret:
    """Compares sets of points with the exhaustive front.

    Every objective is scaled so that the front reaches from 0 to 1; the reference point is 1.1 in
    each. Points that are worse than that in any objective count for nothing, so layouts that hardly
    train do not blow up the volume until every front looks the same.

    Args:
        truth: `[n, k]`, of every layout there is, every column minimized and finite.

    Attributes:
        front: indices in `truth` of what no other point dominates.

    Raises:
        WorkbenchError: `truth` is empty.
    """

    def __init__(self, truth: Sequence[Sequence[float]]) -> None:
        self.front = pareto_front(truth)
        if not self.front:
            raise WorkbenchError("no layout of the space has figures to compare with.")
        columns = list(zip(*(truth[index] for index in self.front), strict=True))
        everything = list(zip(*truth, strict=True))
        self._low = [min(column) for column in columns]
        self._span = [
            max(column) - low or max(whole) - low or 1.0
            for column, whole, low in zip(columns, everything, self._low, strict=True)
        ]
        self._reference = [1.0 + MARGIN] * len(columns)
        self._best = self._volume([truth[index] for index in self.front])

    def of(self, points: Iterable[Sequence[float]]) -> float:
        """1 where nothing was found, 0 where all of the front's hypervolume was."""
        return max(0.0, 1.0 - self._volume(points) / self._best)

    def curve(self, found: Iterable[Sequence[float] | None]) -> list[float]:
        """The regret after each evaluation; None for one that yielded no figures."""
        front: list[Sequence[float]] = []
        regrets: list[float] = []
        for point in found:
            if point is not None:
                points = [*front, point]
                front = [points[index] for index in pareto_front(points)]
            regrets.append(self.of(front))
        return regrets

    def _volume(self, points: Iterable[Sequence[float]]) -> float:
        scaled = [
            [
                (value - low) / span
                for value, low, span in zip(point, self._low, self._span, strict=True)
            ]
            for point in points
        ]
        return hypervolume(scaled, self._reference)


def after(share: float, regrets: Sequence[float]) -> float:
    """The regret after a share of the evaluations, at least one."""
    return regrets[max(1, math.ceil(share * len(regrets))) - 1]
