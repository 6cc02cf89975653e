"""Intervals: t quantiles against published values, and what overlaps is not ranked."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.intervals import Interval, interval, t_quantile
from workbench.records import Study

figures = st.lists(st.floats(-100, 100), min_size=2, max_size=8)

# Student's t, two-sided 95 % (97.5th percentiles), as published tables have them.
TABLE_95 = {
    1: 12.7062047, 2: 4.3026527, 3: 3.1824463, 4: 2.7764451, 5: 2.5705818, 6: 2.4469119,
    7: 2.3646243, 8: 2.3060041, 9: 2.2621572, 10: 2.2281389, 15: 2.1314495, 20: 2.0859634,
    30: 2.0422725, 60: 2.0002978, 120: 1.9799304,
}  # fmt: skip


@pytest.mark.parametrize(("freedom", "value"), TABLE_95.items())
def test_t_quantiles_are_those_of_the_tables(freedom, value):
    assert t_quantile(freedom) == pytest.approx(value, abs=1e-6)


@given(st.floats(0.01, 0.99))
def test_t_quantiles_of_one_and_two_degrees_are_their_formulas(level):
    assert t_quantile(1, level) == pytest.approx(math.tan(math.pi / 2 * level), rel=1e-9)
    assert t_quantile(2, level) == pytest.approx(level * math.sqrt(2 / (1 - level**2)), rel=1e-9)


@given(st.integers(1, 60), st.floats(0.05, 0.9), st.floats(0.01, 0.09))
def test_t_quantiles_rise_with_the_level_and_fall_to_the_normal_one(freedom, level, more):
    normal = statistics.NormalDist().inv_cdf((1 + level) / 2)
    assert t_quantile(freedom, level + more) > t_quantile(freedom, level) > normal
    assert t_quantile(freedom, level) > t_quantile(freedom + 1, level)


def test_a_large_sample_is_normal():
    assert t_quantile(100_000) == pytest.approx(statistics.NormalDist().inv_cdf(0.975), abs=3e-5)


@pytest.mark.parametrize(("freedom", "level"), [(0, 0.95), (3, 0.0), (3, 1.0)])
def test_no_quantile_where_there_is_none(freedom, level):
    with pytest.raises(ValueError, match="no t quantile"):
        t_quantile(freedom, level)


@given(figures, st.floats(-10, 10), st.floats(0.1, 10))
def test_an_interval_moves_and_scales_with_its_figures(values, shift, scale):
    one, other = interval(values), interval([scale * value + shift for value in values])
    assert other.mean == pytest.approx(scale * one.mean + shift, abs=1e-6)
    assert other.half == pytest.approx(scale * one.half, rel=1e-6, abs=1e-6)


def test_an_interval_by_hand():
    found = interval([1.0, 2.0, 3.0])  # deviation 1, error 1/√3
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.3026527 / math.sqrt(3), abs=1e-6)
    assert found.count == 3


@given(st.floats(-1e6, 1e6), st.integers(2, 9))
def test_equal_figures_are_their_own_mean_and_leave_no_doubt(value, count):
    assert interval([value] * count) == Interval(mean=value, half=0.0, count=count)


def test_95_percent_of_intervals_hold_the_truth():
    normal = statistics.NormalDist(5.0, 2.0)
    draws = normal.samples(3 * 4000, seed=1)
    groups = [interval(draws[start : start + 3]) for start in range(0, len(draws), 3)]
    held = sum(abs(found.mean - 5.0) <= (found.half or 0.0) for found in groups)
    assert held / 4000 == pytest.approx(0.95, abs=0.012)


def test_one_figure_has_no_width_and_overlaps_with_all():
    one = interval([1.0])
    assert one == Interval(mean=1.0, half=None, count=1)
    assert one.overlaps(Interval(mean=9.0, half=0.1, count=3))
    assert not Interval(mean=1.0, half=0.1, count=3).overlaps(Interval(mean=2, half=0.8, count=3))


@pytest.mark.parametrize(
    ("mean", "half", "unit", "text"),
    [
        (3.6412, 0.0496, "bits/byte", "3.641 ± 0.050"),
        (3.6412, 0.00001, "bits/byte", "3.641 ± 1.000e-05"),
        (-3.6412, 0.05, "", "-3.641 ± 0.050"),
        (1234.5, 20.4, "ms", "1,234 ± 20"),
        (3.0, None, "ms", "3 ± ?"),
        (3 * 2**20, 2**19, "bytes", "3.000 MiB ± 512.0 KiB"),
    ],
)
def test_intervals_for_people(mean, half, unit, text):
    assert Interval(mean=mean, half=half, count=3).text(unit) == text


def write(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Three trials: losses of 0 and 1 overlap over seeds, 2 is apart; weights are static."""
    objectives = [
        {"name": "loss", "unit": "nats", "direction": "minimize"},
        {"name": "weights", "unit": "parameters", "direction": "minimize"},
    ]
    data = {
        "name": "s", "objectives": objectives, "units": {"loss": "nats", "weights": "parameters"},
        "stages": {"loss": "trained", "weights": "static"},
    }  # fmt: skip
    write(tmp_path / "s" / "study.json", data)
    for number, losses in enumerate([(1.0, 1.2, 1.1), (1.3, 1.1, 1.15), (9.0, 9.1, 9.05)]):
        own = {"loss": losses[0], "weights": 100.0 - number}
        record = {"outcome": "complete", "metrics": own, "pattern": "tt"}
        write(tmp_path / "s" / "trials" / f"{number:05d}" / "trial.json", record)
        for seed, loss in zip((11, 22), losses[1:], strict=True):
            path = tmp_path / "s" / "confirmed" / f"{number:05d}" / str(seed) / "trial.json"
            write(path, {"outcome": "complete", "metrics": {"loss": loss}})
    return Study(tmp_path / "s")


def test_the_searchs_own_training_is_one_of_the_seeds(study):
    first, *_ = study.confirmed()
    assert first.number == 0
    assert first.seeds == (11, 22)
    assert first.values == {"loss": (1.0, 1.2, 1.1)}
    assert first.intervals["loss"] == interval([1.0, 1.2, 1.1])


def test_what_overlaps_is_unresolved_on_both_sides_and_what_does_not_is_ranked(study):
    unresolved = {point.number: point.unresolved for point in study.confirmed()}
    assert unresolved == {0: {1: ("loss",)}, 1: {0: ("loss",)}, 2: {}}


@pytest.mark.parametrize(("again", "tie"), [((1.0, 1.0), True), ((0.5, 1.5), False)])
def test_equal_means_are_resolved_only_if_every_seed_says_so(study, again, tie):
    for seed, loss in zip((11, 22), again, strict=True):
        for number in (0, 1):
            path = study.path / "confirmed" / f"{number:05d}" / str(seed) / "trial.json"
            write(path, {"outcome": "complete", "metrics": {"loss": loss}})
    path = study.path / "trials" / "00001" / "trial.json"
    write(path, {"outcome": "complete", "metrics": {"loss": 1.0, "weights": 99.0}})
    first, second, _ = study.confirmed()
    assert first.intervals == second.intervals
    assert (1 not in first.unresolved, 0 not in second.unresolved) == (tie, tie)


def test_a_seed_that_failed_is_named_and_left_out(study):
    folder = study.path / "confirmed" / "00002"
    write(folder / "11" / "trial.json", {"outcome": "diverged", "metrics": {}})
    (folder / "22" / "trial.json").write_text("{")
    write(folder / "33" / "trial.json", {"outcome": "complete", "metrics": {"loss": None}})
    point = study.confirmed()[2]
    assert point.failed == {11: "diverged", 22: "damaged", 33: "damaged"}
    assert point.intervals["loss"] == Interval(mean=9.0, half=None, count=1)
    assert set(point.unresolved) == {0, 1}  # one training is no evidence of an order


def test_json_data(study):
    data = study.confirmed()[0].to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["unresolved"] == {"1": ["loss"]}
    assert data["objectives"]["loss"]["values"] == [1.0, 1.2, 1.1]


def test_a_study_that_was_never_confirmed(study):
    (study.path / "confirmed").rename(study.path / "away")
    assert study.confirmed() == []
