"""The Gaussian process and the gains, against the textbook's formulas and against grids."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from workbench.layout import Block, Layout, Named
from workbench.surrogate import (
    LENGTHS,
    LINEAR,
    MARGIN,
    NOISES,
    features,
    gains,
    most_hoped,
    regress,
    table,
)


def layout(*layers: str, **changes) -> Layout:
    blocks = tuple(Block(layer=name) for name in layers)
    return Layout(d_model=32, vocab_size=64, blocks=blocks).replace(**changes)


def textbook(x_NF, y_N, x_MF):
    """Posterior mean and deviation by the inverse, of the likeliest of all kernels."""
    z_N = (y_N - y_N.mean()) / y_N.std()
    best = None
    for share, linear, noise in itertools.product(LENGTHS, LINEAR, NOISES):
        length = share * np.sqrt(x_NF.shape[1])

        def kernel(a, b, length=length, linear=linear):
            near = np.exp(-np.sum((a[:, None] - b[None]) ** 2, -1) / (2 * length**2))
            return linear * np.einsum("af,bf->ab", a, b) / a.shape[1] + (1 - linear) * near

        k_NN = kernel(x_NF, x_NF) + noise * np.eye(len(z_N))
        _, log_determinant = np.linalg.slogdet(k_NN)
        likelihood = -0.5 * z_N @ np.linalg.inv(k_NN) @ z_N - 0.5 * log_determinant
        if best is None or likelihood > best[0]:
            k_MN = kernel(x_MF, x_NF)
            mean = k_MN @ np.linalg.inv(k_NN) @ z_N
            own = np.diag(kernel(x_MF, x_MF))
            variance = own - np.einsum("mn,nk,mk->m", k_MN, np.linalg.inv(k_NN), k_MN)
            best = (likelihood, mean, variance)
    _, mean, variance = best
    return mean * y_N.std() + y_N.mean(), np.sqrt(variance) * y_N.std()


@pytest.mark.parametrize("known", [2, 7, 40])
def test_beliefs_are_the_textbooks(known):
    dice = np.random.default_rng(known)
    x_NF, x_MF = dice.normal(size=(known, 3)), dice.normal(size=(9, 3))
    y_N = np.sin(x_NF).sum(1) + 5.0
    belief = regress(x_NF, y_N, x_MF)
    mean, deviation = textbook(x_NF, y_N, x_MF)
    np.testing.assert_allclose(belief.mean, mean, rtol=1e-8)
    np.testing.assert_allclose(belief.deviation, deviation, rtol=1e-6)


def test_what_is_near_is_better_known_than_what_is_far():
    x_NF = np.random.default_rng(0).normal(size=(30, 2))
    y_N = x_NF[:, 0] ** 2
    belief = regress(x_NF, y_N, np.vstack([x_NF[:1] + 0.01, [[30.0, 30.0]]]))
    assert abs(belief.mean[0] - y_N[0]) < 0.2
    assert belief.deviation[0] < 0.3 * belief.deviation[1]


def test_figures_that_are_all_alike_are_believed():
    belief = regress(np.eye(3), np.full(3, 2.5), np.zeros((2, 3)))
    np.testing.assert_allclose(belief.mean, 2.5)


@pytest.mark.parametrize("objectives", [2, 3])
def test_gains_are_volumes_counted_on_a_grid(objectives):
    dice = np.random.default_rng(1)
    known, hoped = dice.random((9, objectives)), dice.random((5, objectives))
    found = gains(known, hoped)
    beaten = [(known <= point).all(1) & (known < point).any(1) for point in known]
    front = known[[not any(row) for row in beaten]]
    assert len(front) > 1
    low, span = front.min(0), np.ptp(front, axis=0)
    steps = 400 if objectives == 2 else 120
    # From far below the front to the reference point, in the front's own units.
    start = min(0.0, float(((hoped - low) / span).min()))
    cells = start + (np.arange(steps) + 0.5) / steps * (1 + MARGIN - start)
    grid = np.stack(np.meshgrid(*[cells] * objectives), -1).reshape(-1, objectives)

    def dominated(points):
        return np.any([(grid >= (point - low) / span).all(1) for point in points], axis=0)

    cell = ((1 + MARGIN - start) / steps) ** objectives
    before = dominated(front)
    for point, gain in zip(hoped, found, strict=True):
        counted = (dominated([point]) & ~before).sum() * cell
        assert gain == pytest.approx(counted, abs=0.03 * (1 + counted))


def test_what_is_dominated_gains_nothing():
    known = np.array([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]])
    found = gains(known, np.array([[2.5, 2.5], [2.0, 2.0], [1.5, 1.5]]))
    assert list(found[:2]) == [0.0, 0.0]
    assert found[2] > 0


def test_features_tell_order_kind_size_and_quantizer_apart():
    plain = layout("mamba", "attention", "mamba")
    others = [
        layout("attention", "mamba", "mamba"),
        layout("mamba", "mamba", "mamba"),
        layout("mamba", "attention", "mamba", "mamba"),
        plain.replace(d_model=64),
        plain.replace(blocks=(*plain.blocks[:2], Block(layer="mamba", config={"d_state": 8}))),
        plain.replace(
            blocks=(*plain.blocks[:2], Block(layer="mamba", quantizer=Named(name="int8")))
        ),
    ]
    assert features(plain) == features(layout("mamba", "attention", "mamba"))
    for other in others:
        assert features(other) != features(plain)


def test_features_are_of_names_and_numbers():
    """A number of a quantizer's is one feature, not one a value; what is no number is a share."""
    blocks = (
        Block(
            layer="mlp", config={"gate": "relu"}, quantizer=Named(name="int8", config={"group": 32})
        ),
        Block(
            layer="mlp", config={"gate": "silu"}, quantizer=Named(name="int8", config={"group": 64})
        ),
        Block(layer="mlp", config={"gate": "silu"}),
    )
    found = features(Layout(d_model=32, vocab_size=64, blocks=blocks))
    assert found["quantizer.int8"] == pytest.approx(2 / 3)
    assert found["quantizer.none"] == pytest.approx(1 / 3)
    assert found["quantizer.int8.group"] == 48.0
    assert found["mlp.gate=relu"] == pytest.approx(1 / 3)
    assert found["mlp.gate=silu"] == pytest.approx(2 / 3)


def test_gains_over_a_large_front_of_many_objectives_take_no_time():
    """Whole hypervolumes of such a front take a minute for these points."""
    dice = np.random.default_rng(0)
    known = np.abs(dice.normal(size=(150, 4)))
    known = 1 - known / np.linalg.norm(known, axis=1, keepdims=True)  # none dominates another
    hoped = known[:64] - 0.01
    started = time.process_time()
    assert (gains(known, hoped) > 0).any()
    assert time.process_time() - started < 5


def test_what_is_only_learnt_from_is_on_no_front():
    """A known figure that was made up teaches the model, but nothing has to beat it."""
    x_AF = np.array([[0.0], [1.0], [2.0], [0.5]])
    known_NK = np.array([[2.0, 2.0], [1.0, 1.0]])
    exact_MK = np.array([[3.0, 3.0], [1.5, 1.5]])
    for judged, best in (([True, True], 0), ([True, False], 1)):
        found = most_hoped(
            x_AF, known_NK, exact_MK, judged_N=np.array(judged), running=0, optimism=1.0
        )
        assert found == best


def test_tables_are_standardized_and_drop_what_never_varies():
    rows = [{"a": 1.0, "same": 4.0}, {"a": 3.0, "same": 4.0, "b": 2.0}]
    np.testing.assert_allclose(table(rows), [[-1], [1]])  # a and b tell the same
    more = [*rows, {"a": 3.0, "same": 4.0}]
    assert table(more).shape == (3, 2)
    np.testing.assert_allclose(table(more).mean(0), 0.0, atol=1e-12)
    np.testing.assert_allclose(table(more).std(0), 1.0)
    assert table([{"a": 1.0}]).shape == (1, 0)
