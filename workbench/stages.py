"""The figures of one stage of a trial, and the constraints on them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from workbench.metric import Metric, Stage, Subject
from workbench.study_config import Bounds
from workbench.training import DivergedError
from workbench.verdict import InfeasibleError, Verdict


def has_stage(metrics: Mapping[str, Metric], stage: Stage) -> bool:
    """Whether any of a study's metrics belongs to a stage."""
    return any(metric.stage == stage for metric in metrics.values())


def first_dear_stage(metrics: Mapping[str, Metric]) -> str:
    """The stage that a trial begins with in a worker."""
    dear: tuple[Stage, ...] = ("measured", "synthetic")
    return next((stage for stage in dear if has_stage(metrics, stage)), "training")


def measure_stage(
    metrics: Mapping[str, Metric],
    constraints: Mapping[str, Bounds],
    stage: Stage,
    subject: Subject,
    verdict: Verdict,
) -> None:
    """Add every metric of one stage to the verdict, then the constraints on them.

    Raises:
        DivergedError: a figure is NaN or infinite.
        InfeasibleError: a figure is out of bounds.
    """
    violated = []
    for name, metric in metrics.items():
        if metric.stage != stage:
            continue
        subject.extras, subject.notes = {}, {}
        value = float(metric.measure(subject))
        if not math.isfinite(value):
            raise DivergedError(f"{name} is {value}")
        verdict.metrics[name] = value
        for key, extra in subject.extras.items():
            finite = float(extra) if math.isfinite(float(extra)) else None
            verdict.extras[f"{name}.{key}"] = finite
        verdict.notes |= {f"{name}.{key}": str(note) for key, note in subject.notes.items()}
        if name in constraints:
            bounds = constraints[name]
            verdict.constraints[name] = bounds.violation(value)
            if verdict.constraints[name] > 0:
                below = value < bounds.min
                limit = f"below min {bounds.min:,}" if below else f"above max {bounds.max:,}"
                violated.append(f"{name} = {value:,.8g} is {limit}")
    if violated:
        raise InfeasibleError("; ".join(violated))
