"""Plain data → plotly figure. No records, no Streamlit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from workbench.dashboard.quantities import Quantity
from workbench.pareto import pareto_front

if TYPE_CHECKING:
    import pandas as pd

SCALE = "Viridis"
INK = "#7A828C"  # lines that read on a white and on a dark ground
COLOUR = "#0072B2"
BETTER = {"minimize": "lower is better", "maximize": "higher is better", None: ""}


def pareto_figure(
    points: pd.DataFrame, x: Quantity, y: Quantity, colour: Quantity | None = None
) -> go.Figure:
    """Two metrics of every complete trial, a third as colour, front points as diamonds.

    The dotted line bounds what the points reach in these two metrics alone; with more than two
    objectives, points off it can be on the front for the sake of another one.

    Args:
        points: a row a trial, indexed by its number: a column a metric in its recorded unit,
            `front` (whether no other trial dominates it) and `pattern`.

    Returns:
        A figure whose points carry their trial's number first in `customdata`.
    """
    shown = points.dropna(subset=list({q.name for q in (x, y, colour) if q is not None}))
    figure = go.Figure()
    line = _reach(shown, x, y)
    if line is not None:
        figure.add_trace(line)
    for on_front in (False, True):
        figure.add_trace(_points(shown[shown["front"] == on_front], shown, x, y, colour, on_front))
    figure.update_layout(
        xaxis=_axis(shown, x),
        yaxis=_axis(shown, y),
        coloraxis=_colour_axis(shown, colour),
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        margin={"l": 10, "r": 10, "t": 30, "b": 10},
        # A refresh with the same axes keeps the zoom.
        uirevision=f"{x.name} {y.name} {colour.name if colour else ''}",
    )
    return figure


def curve_figure(curve: pd.DataFrame) -> go.Figure:
    """The loss over the tokens seen in training.

    Args:
        curve: a row a recorded step: step, tokens, seconds, loss (nats a token), lr.
    """
    figure = go.Figure(
        go.Scatter(
            x=curve["tokens"],
            y=curve["loss"],
            customdata=curve[["step", "seconds", "lr"]],
            mode="lines+markers" if len(curve) < 2 else "lines",
            line={"color": COLOUR, "width": 2},
            name="training loss",
            hovertemplate=(
                "loss %{y:.4f} nats/token<br>step %{customdata[0]}, %{x:,} tokens"
                "<br>%{customdata[1]:.1f} s, lr %{customdata[2]:.3g}<extra></extra>"
            ),
        )
    )
    figure.update_layout(
        xaxis={"title": {"text": "tokens seen"}, "tickformat": "~s", "rangemode": "tozero"},
        yaxis={"title": {"text": "training loss [nats/token]"}},
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        uirevision="curve",
    )
    return figure


def _values(points: pd.DataFrame, quantity: Quantity, whole: pd.DataFrame) -> pd.Series[Any]:
    """A metric's values in the unit that its axis shows."""
    divisor, _ = quantity.scale(whole[quantity.name].abs().max() if len(whole) else 0.0)
    return points[quantity.name] / divisor


def _heading(points: pd.DataFrame, quantity: Quantity) -> str:
    _, unit = quantity.scale(points[quantity.name].abs().max() if len(points) else 0.0)
    return f"{quantity.name} [{unit}]" if unit else quantity.name


def _points(
    points: pd.DataFrame,
    whole: pd.DataFrame,
    x: Quantity,
    y: Quantity,
    colour: Quantity | None,
    on_front: bool,
) -> go.Scatter:
    marker: dict[str, Any] = {
        "symbol": "diamond" if on_front else "circle",
        "size": 14 if on_front else 9,
        "opacity": 1.0 if on_front else 0.6,
        "line": {"width": 1.5 if on_front else 1, "color": INK},
        "color": COLOUR,
    }
    hover = [
        "<b>trial %{customdata[0]}</b>  %{customdata[1]}",
        f"{_heading(whole, x)}: %{{x:.4~g}}",
        f"{_heading(whole, y)}: %{{y:.4~g}}",
    ]
    if colour is not None:
        marker |= {"color": _values(points, colour, whole), "coloraxis": "coloraxis"}
        hover.append(f"{_heading(whole, colour)}: %{{marker.color:.4~g}}")
    return go.Scatter(
        x=_values(points, x, whole),
        y=_values(points, y, whole),
        customdata=list(zip(points.index.tolist(), points["pattern"], strict=True)),
        mode="markers",
        marker=marker,
        name="Pareto front" if on_front else "dominated",
        hovertemplate="<br>".join(hover) + "<extra></extra>",
    )


def _reach(points: pd.DataFrame, x: Quantity, y: Quantity) -> go.Scatter | None:
    """The staircase through the points that are best in `x` and `y` alone."""
    if x.direction is None or y.direction is None or x.name == y.name or points.empty:
        return None
    kept = pareto_front(list(zip(x.sign * points[x.name], y.sign * points[y.name], strict=True)))
    best = points.iloc[kept].sort_values([x.name, y.name])
    if len(best) < 2:
        return None
    return go.Scatter(
        x=_values(best, x, points),
        y=_values(best, y, points),
        mode="lines",
        # A corner lies where both of its neighbours still dominate.
        line={"shape": "hv" if x.direction == "minimize" else "vh", "dash": "dot", "color": INK},
        name="front of these two",
        hoverinfo="skip",
    )


def _axis(points: pd.DataFrame, quantity: Quantity) -> dict[str, Any]:
    better = BETTER[quantity.direction]
    title = _heading(points, quantity) + (f" – {better}" if better else "")
    axis: dict[str, Any] = {"title": {"text": title}, "zeroline": False}
    if quantity.unit != "bytes" and len(points) and points[quantity.name].abs().max() >= 10_000:
        axis["tickformat"] = "~s"
    return axis


def _colour_axis(points: pd.DataFrame, colour: Quantity | None) -> dict[str, Any]:
    if colour is None:
        return {"showscale": False}
    return {
        "colorscale": SCALE,
        "reversescale": colour.direction == "maximize",  # darker is better, either way
        "colorbar": {"title": {"text": _heading(points, colour), "side": "right"}, "thickness": 14},
    }
