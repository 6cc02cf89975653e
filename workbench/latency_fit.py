"""What models that were measured whole teach a sum of single layers: an overhead, and scales.

Launches overlap, caches are shared, so layers add up only nearly. An overhead and one scale a
layer, all at least 0, are fitted a phase, by least squares of the relative error. A scale is drawn
towards 1 as firmly as a fraction of an observation would: ten models tell what is off, and none
cannot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from workbench.latency_parts import OUTSIDE

PRIOR = 0.1  # observations that a scale of 1 weighs
SWEEPS = 20_000  # of the coordinate descent, far more than it takes
Vector = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Correction:
    """What whole models of one phase taught.

    Attributes:
        overhead: seconds a call.
        scales: by layer; 1 for one that is not named.
        observations: whole models that it was fitted to; 0 is no correction.
    """

    overhead: float = 0.0
    scales: Mapping[str, float] = dataclasses.field(default_factory=dict)
    observations: int = 0

    def scale(self, layer: str) -> float:
        """The factor on the entries of a layer; the outside has none."""
        return self.scales.get(layer, 1.0)


def fit(rows: Sequence[tuple[Mapping[str, float], float]]) -> Correction:
    """The correction that whole models of one phase call for.

    Args:
        rows: of each model the uncorrected seconds of the outside and of each layer
            (`LatencyModel.terms`), and the seconds of the whole, measured.
    """
    if not rows:
        return Correction()
    layers = sorted({layer for terms, _ in rows for layer in terms} - {OUTSIDE})
    # A column for the overhead and one a layer; dividing by the figure makes errors relative.
    matrix = np.array(
        [[1 / s, *(terms.get(layer, 0.0) / s for layer in layers)] for terms, s in rows]
    )
    target = np.array([1 - terms[OUTSIDE] / seconds for terms, seconds in rows])
    prior = PRIOR**0.5 * np.eye(1 + len(layers))[1:]
    solution = non_negative_least_squares(
        np.vstack([matrix, prior]), np.concatenate([target, np.full(len(layers), PRIOR**0.5)])
    )
    overhead, *scales = (float(value) for value in solution)
    return Correction(
        overhead=overhead, scales=dict(zip(layers, scales, strict=True)), observations=len(rows)
    )


def non_negative_least_squares(matrix: NDArray[np.float64], target: Vector) -> Vector:
    """x ≥ 0 with the least |matrix · x - target|, by cyclic coordinate descent.

    Columns are scaled to one length first; a column of zeros gets 0.
    """
    lengths = np.linalg.norm(matrix, axis=0)
    lengths[lengths == 0] = np.inf
    scaled = matrix / lengths
    gram, pull = scaled.T @ scaled, scaled.T @ target
    x = np.zeros(len(pull))
    for _ in range(SWEEPS):
        before = x.copy()
        for index in range(len(x)):
            if gram[index, index] > 0:
                x[index] = max(0.0, x[index] + (pull[index] - gram[index] @ x) / gram[index, index])
        if np.abs(x - before).max() <= 1e-14 * max(1.0, np.abs(x).max()):
            break
    solution: Vector = x / lengths
    return solution
