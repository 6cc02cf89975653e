"""Regret: 1 with nothing, 0 with the whole front, and never up again."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench import WorkbenchError
from workbench.regret import Regret, after

value = st.floats(-5, 5).map(lambda x: round(x, 2))
truths = st.integers(1, 3).flatmap(
    lambda k: st.lists(st.tuples(*[value] * k), min_size=1, max_size=8)
)


@given(truths, st.randoms())
def test_a_curve_falls_from_one_to_nothing(truth, random):
    regret = Regret(truth)
    found = random.sample([*truth, None], len(truth) + 1)
    curve = regret.curve(found)
    assert all(after <= before + 1e-12 for before, after in zip([1.0, *curve], curve, strict=False))
    assert curve[-1] == pytest.approx(0, abs=1e-9)
    assert regret.of([]) == 1
    assert regret.of([truth[i] for i in regret.front]) == 0


@given(truths, st.floats(0.01, 1000), st.floats(-10, 10))
def test_units_do_not_matter(truth, scale, shift):
    found = truth[: len(truth) // 2]
    moved = [[x * scale + shift for x in point] for point in truth]
    ours = Regret(truth).of(found)
    assert Regret(moved).of(moved[: len(found)]) == pytest.approx(ours, abs=1e-6)


def test_a_layout_that_hardly_trained_changes_nothing():
    truth = [(0.0, 1.0), (1.0, 0.0), (0.4, 0.4), (0.9, 0.9)]
    ours = Regret(truth).of(truth[3:])
    assert 0 < ours < 1
    assert Regret([*truth, (1e9, 0.5)]).of(truth[3:]) == ours


def test_by_hand():
    # Front (0, 1), (1, 0), reference (1.1, 1.1): 1.1*0.1 + 0.1*1.0 = 0.21; one end alone: 0.11.
    assert math.isclose(Regret([(0, 1), (1, 0)]).of([(0, 1)]), 1 - 0.11 / 0.21)


def test_shares_of_the_evaluations():
    assert [after(share, range(10)) for share in (0.01, 0.1, 0.25, 0.5, 1)] == [0, 0, 2, 4, 9]


def test_no_truth():
    with pytest.raises(WorkbenchError, match="no layout"):
        Regret([])
