"""How good a latency model is, on layouts that were measured whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from workbench.latency import LatencyModel
from workbench.latency_machine import Load
from workbench.latency_table import Observation
from workbench.rank_correlation import kendall_tau


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One layout: predicted beside measured."""

    layout_hash: str
    pattern: str
    load: Load
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative to what was measured; above 0 is too slow a prediction."""
        return self.predicted / self.measured - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How good the predictions of one load are, on layouts that were measured whole.

    Attributes:
        load: phase, batch and length.
        rows: a layout each.
        mape: mean absolute relative error.
        kendall_tau: of the order of the layouts (tau-b); None where there is no order to compare.
        worst: the row with the largest absolute error.
        unknown: layouts left out, for the table lacks a part of them.
    """

    load: Load
    rows: tuple[Comparison, ...]
    mape: float
    kendall_tau: float | None
    worst: Comparison
    unknown: int


def evaluate(model: LatencyModel, observations: Sequence[Observation]) -> list[Evaluation]:
    """How well the model predicts whole models, an Evaluation a load, in order.

    Give it other layouts than it was fitted to. A load of which nothing can be predicted is left
    out.
    """
    evaluations = []
    for load in sorted({seen.load for seen in observations}):
        here = [seen for seen in observations if seen.load == load]
        rows = tuple(row for seen in here if (row := _compared(model, seen)) is not None)
        if not rows:
            continue
        evaluations.append(
            Evaluation(
                load=load,
                rows=rows,
                mape=sum(abs(row.error) for row in rows) / len(rows),
                kendall_tau=kendall_tau(
                    [row.predicted for row in rows], [row.measured for row in rows]
                ),
                worst=max(rows, key=lambda row: abs(row.error)),
                unknown=len(here) - len(rows),
            )
        )
    return evaluations


def _compared(model: LatencyModel, seen: Observation) -> Comparison | None:
    load = seen.load
    predicted = model.predict(seen.layout, load.phase, load.batch_size, load.length).seconds
    if predicted is None:
        return None
    return Comparison(
        layout_hash=seen.layout.hash,
        pattern=model.builder.pattern(seen.layout),
        load=load,
        predicted=predicted,
        measured=seen.seconds,
    )
