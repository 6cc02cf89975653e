"""Charts: plain data in, plotly figure out."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from workbench.dashboard.charts import curve_figure, pareto_figure
from workbench.dashboard.quantities import Quantity
from workbench.pareto import pareto_front

LOSS = Quantity(name="loss", unit="bits/byte", direction="minimize")
SPEED = Quantity(name="speed", unit="tokens/s", direction="maximize")
SIZE = Quantity(name="size", unit="bytes", direction="minimize")
COUNT = Quantity(name="count", unit="parameters")


def points(count: int = 12, seed: int = 0) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "loss": generator.uniform(1, 5, count),
            "speed": generator.uniform(10, 1000, count),
            "size": generator.uniform(2**20, 8 * 2**20, count),
            "count": generator.uniform(1e5, 9e5, count),
            "pattern": ["M-A-"] * count,
        },
        index=pd.Index(range(100, 100 + count), name="number"),
    )
    signed = frame.assign(speed=-frame["speed"])[["loss", "speed", "size"]].to_numpy().tolist()
    front = set(pareto_front(signed))
    return frame.assign(front=[row in front for row in range(count)])


def by_name(figure):
    return {trace.name: trace for trace in figure.data}


def test_every_point_is_drawn_once_and_knows_its_trial():
    frame = points()
    traces = by_name(pareto_figure(frame, LOSS, SPEED, SIZE))
    drawn = {}
    for name in ("Pareto front", "dominated"):
        trace = traces[name]
        for x, y, (number, pattern) in zip(trace.x, trace.y, trace.customdata, strict=True):
            drawn[number] = (x, y, name == "Pareto front")
            assert pattern == "M-A-"
    expected = {
        number: (row["loss"], row["speed"], row["front"]) for number, row in frame.iterrows()
    }
    assert drawn == expected


def test_axes_name_units_and_directions_and_scale_bytes():
    figure = pareto_figure(points(), SIZE, SPEED, COUNT)
    assert figure.layout.xaxis.title.text == "size [MiB] – lower is better"
    assert figure.layout.yaxis.title.text == "speed [tokens/s] – higher is better"
    assert figure.layout.coloraxis.colorbar.title.text == "count [parameters]"
    values = [x for trace in figure.data for x in trace.x]
    assert min(values) >= 1
    assert max(values) <= 8


@pytest.mark.parametrize(("x", "y"), list(itertools.permutations((LOSS, SPEED, SIZE), 2)))
def test_the_staircase_bounds_every_point(x, y):
    """No point lies beyond the line, and each of its corners is a point that nothing dominates."""
    frame = points(40, seed=3)
    figure = pareto_figure(frame, x, y)
    line = by_name(figure)["front of these two"]
    marked = np.array(
        [(a, b) for trace in figure.data[1:] for a, b in zip(trace.x, trace.y, strict=True)]
    )
    signs = np.array([x.sign, y.sign])
    corners = np.array(list(zip(line.x, line.y, strict=True))) * signs
    for point in marked * signs:
        assert (corners <= point).all(axis=1).any()
    assert set(map(tuple, corners * signs)) <= set(map(tuple, marked))
    # Where the drawn line turns, the neighbours on both sides are at least as good.
    turn = "hv" if x.direction == "minimize" else "vh"
    assert line.line.shape == turn
    for first, second in itertools.pairwise(corners * signs):
        corner = (second[0], first[1]) if turn == "hv" else (first[0], second[1])
        for neighbour in (first, second):
            assert (neighbour * signs <= np.array(corner) * signs).all()


def test_there_is_no_staircase_where_a_direction_is_unknown():
    assert "front of these two" not in by_name(pareto_figure(points(), COUNT, LOSS))
    assert "front of these two" not in by_name(pareto_figure(points(), LOSS, LOSS))


def test_a_trial_without_a_figure_is_left_out():
    frame = points()
    frame.loc[103, "count"] = np.nan
    figure = pareto_figure(frame, LOSS, SPEED, COUNT)
    drawn = {
        number
        for trace in figure.data
        if trace.customdata is not None
        for number, _ in trace.customdata
    }
    assert drawn == set(frame.index) - {103}


def test_no_points_give_an_empty_figure():
    figure = pareto_figure(points(3).iloc[:0], LOSS, SPEED, SIZE)
    assert all(len(trace.x) == 0 for trace in figure.data)


def test_darker_is_better_in_either_direction():
    assert pareto_figure(points(), LOSS, SIZE, SPEED).layout.coloraxis.reversescale
    assert not pareto_figure(points(), LOSS, SPEED, SIZE).layout.coloraxis.reversescale


def test_the_curve_is_the_recorded_loss_over_tokens():
    curve = pd.DataFrame(
        {
            "step": [1, 2, 3],
            "tokens": [512, 1024, 1536],
            "seconds": [0.1, 0.2, 0.3],
            "loss": [5.0, 4.0, float("nan")],
            "lr": [1e-3] * 3,
        }
    )
    figure = curve_figure(curve)
    assert list(figure.data[0].x) == [512, 1024, 1536]
    np.testing.assert_array_equal(figure.data[0].y, [5.0, 4.0, np.nan])
    assert figure.layout.yaxis.title.text == "training loss [nats/token]"
    assert figure.layout.xaxis.title.text == "tokens seen"
