"""A Gaussian process over layouts, and what another layout would add to a front.

Few trainings are all that a search has to learn from, so the model is a small one: standardized
features of the layout (`features`), a linear kernel and a squared-exponential one, whose shares,
length and noise are chosen by marginal likelihood among a few (Rasmussen and Williams, "Gaussian
Processes for Machine Learning", 2006, algorithm 2.1). numpy alone.

Legend for shapes: N layouts that are known, M that are not, A all, F features, K objectives,
P points on a front.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workbench.hypervolume import hypervolume
from workbench.layout import Layout
from workbench.pareto import pareto_front

Array = NDArray[np.float64]
# In standard deviations of a feature a square root of the number of features, and of the figure.
LENGTHS = (0.4, 0.7, 1.2, 2.0)
NOISES = (0.01, 0.05, 0.2)
LINEAR = (0.0, 0.3, 0.6, 0.9)  # share of the linear kernel
CHOSEN_BY = 150  # layouts at most, evenly out of all, whose likelihood chooses the kernel
MARGIN = 0.1  # of the front's extent, by which the reference point lies behind it


def features(layout: Layout) -> dict[str, float]:
    """Numbers that say what a layout is made of: what any space has, whatever its plugins.

    Sizes; of each kind of layer its count and where in the depth it stands (mean, first and last,
    as shares); of each quantizer its share of the blocks; of both the means of their Config's
    numbers, and how often its other fields have which value, as a share.
    """
    found: dict[str, float] = {
        "d_model": math.log(layout.d_model),
        "blocks": float(len(layout.blocks)),
    }
    places: dict[str, list[float]] = defaultdict(list)
    configs: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for index, block in enumerate(layout.blocks):
        places[block.layer].append((index + 0.5) / len(layout.blocks))
        configs[block.layer].append(block.config)
        quantizer = "quantizer.none"
        if block.quantizer is not None:
            quantizer = f"quantizer.{block.quantizer.name}"
            configs[quantizer].append(block.quantizer.config)
        found[quantizer] = found.get(quantizer, 0.0) + 1 / len(layout.blocks)
    for name, shares in places.items():
        found[f"{name}.count"] = float(len(shares))
        found[f"{name}.mean"] = sum(shares) / len(shares)
        found[f"{name}.first"], found[f"{name}.last"] = shares[0], shares[-1]
    for owner, alike in configs.items():
        found.update({f"{owner}.{name}": mean for name, mean in _means(alike).items()})
    return found


def _means(configs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of each number its mean, of each other value the share of the configs that have it."""
    values: dict[str, list[float]] = defaultdict(list)
    shares: dict[str, float] = defaultdict(float)
    for config in configs:
        for name, value in config.items():
            if isinstance(value, int | float) and math.isfinite(value):
                values[name].append(float(value))
            else:
                shares[f"{name}={value}"] += 1 / len(configs)
    return {name: sum(found) / len(found) for name, found in values.items()} | shares


def table(rows: Sequence[Mapping[str, float]]) -> Array:
    """Feature tables side by side, `[N, F]`, each column standardized; a feature not there is 0.

    Columns that never vary, and all but one of those that are alike, are left out.
    """
    names = sorted({name for row in rows for name in row})
    x_NF = np.array([[row.get(name, 0.0) for name in names] for row in rows], dtype=np.float64)
    x_NF = x_NF.reshape(len(rows), len(names))
    spread_F = x_NF.std(0)
    varied = spread_F > 1e-12
    x_NF = (x_NF[:, varied] - x_NF[:, varied].mean(0)) / spread_F[varied]
    _, first_F = np.unique(x_NF.round(9), axis=1, return_index=True)
    return x_NF[:, np.sort(first_F)]  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class Belief:
    """What is thought of some layouts' figure: mean and standard deviation, each `[M]`."""

    mean: Array
    deviation: Array


def regress(x_NF: Array, y_N: Array, x_MF: Array) -> Belief:
    """Figures of other layouts, from those of N known ones, at least one."""
    center, scale = float(y_N.mean()), float(y_N.std()) or 1.0
    z_N = (y_N - center) / scale
    width = max(x_NF.shape[1], 1)
    choices = itertools.product(LENGTHS, LINEAR, NOISES)
    kernels = (
        (Kernel(length * math.sqrt(width), share), noise) for length, share, noise in choices
    )
    some = slice(None, None, -(-len(z_N) // CHOSEN_BY))  # a fit's time grows with its cube
    likeliest = max(
        (_Fit.of(x_NF[some], z_N[some], kernel, noise) for kernel, noise in kernels),
        key=lambda fit: fit.likelihood,
    )
    best = _Fit.of(x_NF, z_N, likeliest.kernel, likeliest.noise)
    cross_MN = best.kernel(x_MF, x_NF)
    half_NM = np.linalg.solve(best.factor_NN, cross_MN.T)
    variance_M = np.maximum(best.kernel.itself(x_MF) - (half_NM**2).sum(0), 1e-9)
    return Belief(cross_MN @ best.weights_N * scale + center, np.sqrt(variance_M) * scale)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How alike layouts are: `linear x·x' / F + (1 - linear) exp(-|x - x'|² / 2 length²)`."""

    length: float
    linear: float

    def __call__(self, a_AF: Array, b_BF: Array) -> Array:
        products_AB = a_AF @ b_BF.T
        distances_AB = (a_AF**2).sum(1)[:, None] + (b_BF**2).sum(1) - 2 * products_AB
        near_AB = np.exp(-np.maximum(distances_AB, 0.0) / (2 * self.length**2))
        width = max(a_AF.shape[1], 1)
        return self.linear * products_AB / width + (1 - self.linear) * near_AB  # type: ignore[no-any-return]

    def itself(self, a_AF: Array) -> Array:
        """Each with itself, `[A]`."""
        width = max(a_AF.shape[1], 1)
        return self.linear * (a_AF**2).sum(1) / width + (1 - self.linear)  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class _Fit:
    kernel: Kernel
    noise: float
    factor_NN: Array  # lower triangular
    weights_N: Array
    likelihood: float

    @classmethod
    def of(cls, x_NF: Array, z_N: Array, kernel: Kernel, noise: float) -> _Fit:
        kernel_NN = kernel(x_NF, x_NF) + noise * np.eye(len(z_N))
        factor_NN: Array = np.linalg.cholesky(kernel_NN).astype(np.float64)
        weights_N = np.linalg.solve(factor_NN.T, np.linalg.solve(factor_NN, z_N))
        determinant = float(np.log(np.diag(factor_NN)).sum())
        return cls(kernel, noise, factor_NN, weights_N, float(-0.5 * z_N @ weights_N) - determinant)


def gains(known_NK: Array, hoped_MK: Array) -> Array:
    """The hypervolume that each hoped-for point would add to the front of the known ones, `[M]`.

    Everything is minimized. Objectives are scaled by the front's extent, a tenth more of which is
    where the reference point lies.
    """
    front_PK = known_NK[pareto_front(known_NK.tolist())]
    low_K, high_K = front_PK.min(0), front_PK.max(0)
    whole_K = np.ptp(np.vstack([known_NK, hoped_MK]), axis=0)
    span_K = np.where(high_K > low_K, high_K - low_K, np.where(whole_K > 0, whole_K, 1.0))
    front_PK = (front_PK - low_K) / span_K
    reference = [1.0 + MARGIN] * known_NK.shape[1]
    found = []
    for point_K in (hoped_MK - low_K) / span_K:
        # A point's box, less what the front has of it already: little is left of a large front.
        shared_PK = np.unique(np.maximum(front_PK, point_K), axis=0)
        box, taken = point_K[None].tolist(), shared_PK.tolist()
        found.append(hypervolume(box, reference) - hypervolume(taken, reference))
    return np.array(found)


def farthest(x_AF: Array, known: int) -> int:
    """Which of the others is least like all known ones; of none known, most like the others.

    Args:
        x_AF: features of all layouts, of which the first `known` are known.
    """
    x_NF, x_MF = x_AF[:known], x_AF[known:]
    if not known:
        return int(np.argmin((x_MF**2).sum(1)))
    return int(np.argmax(((x_MF[:, None] - x_NF) ** 2).sum(-1).min(1)))


def most_hoped(
    x_AF: Array, known_NK: Array, exact_MK: Array, *, judged_N: Array, running: int, optimism: float
) -> int:
    """Which layout is hoped to add most to the front; the least known one if none adds anything.

    Args:
        x_AF: features of all N + M layouts, the known ones first.
        known_NK: their figures, minimized.
        exact_MK: those of the others, NaN where they are to be predicted.
        judged_N: which known ones really have these figures: the others only teach the model.
        running: how many of the others, the first, are being judged.
        optimism: standard deviations by which a layout may be better than is predicted.

    Returns:
        Its place among the others that are not being judged.
    """
    known_NK, means_MK = known_NK.copy(), exact_MK.copy()
    hopes_MK, doubts_M = exact_MK.copy(), np.zeros(len(exact_MK))
    for k in range(known_NK.shape[1]):
        known_N, mean_M = known_NK[:, k], means_MK[:, k]
        told_M = np.isfinite(mean_M)
        if (known_N > 0).all() and (mean_M[told_M] > 0).all():
            known_N[:], mean_M[told_M] = np.log(known_N), np.log(mean_M[told_M])
        deviation_M = np.zeros(len(mean_M))
        if not told_M.all():
            belief = regress(x_AF[: len(known_N)], known_N, x_AF[len(known_N) :])
            mean_M[:] = np.where(told_M, mean_M, belief.mean)
            deviation_M = np.where(told_M, 0.0, belief.deviation)
        hopes_MK[:, k] = mean_M - optimism * deviation_M
        doubts_M += deviation_M / (known_N.std() or 1.0)
    judged_NK = known_NK[judged_N.astype(bool)]
    gain_M = gains(np.vstack([judged_NK, means_MK[:running]]), hopes_MK[running:])
    return int(np.argmax(gain_M if gain_M.max() > 0 else doubts_M[running:]))
