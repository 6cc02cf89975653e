"""Confidence intervals of what `workbench confirm` trained again. From records alone; no torch.

    runs/<study>/confirmed/00007/<seed>/trial.json      the trial of that number, with that seed

Intervals are Student's: two-sided, 95 %, over seeds, of which the search's own training is one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError
from workbench.figures import figure
from workbench.files import read_json

if TYPE_CHECKING:
    from workbench.records import Study

LEVEL = 0.95
FOLDER = "confirmed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean of figures and how far the truth may be from it.

    Attributes:
        mean: of the figures, in their unit.
        half: half of the interval's width; None where one figure tells nothing of the spread.
        count: of the figures.
    """

    mean: float
    half: float | None
    count: int

    def overlaps(self, other: Interval) -> bool:
        """Whether a value is in both; an interval of one figure has no ends."""
        if self.half is None or other.half is None:
            return True
        return abs(self.mean - other.mean) <= self.half + other.half

    def text(self, unit: str = "") -> str:
        """`mean ± half` for people, both to the same digit; `± ?` where there is no half."""
        mean = figure(self.mean, unit)
        if self.half is None:
            return f"{mean} ± ?"
        decimals = len(mean.partition(".")[2])
        half = f"{self.half:,.{decimals}f}"
        # A scaled figure has a prefix of its own, and no half is shown as the 0 that it is not.
        plain = mean.replace(",", "").lstrip("-").replace(".", "").isdigit()
        if not plain or not float(half.replace(",", "")):
            half = figure(self.half, unit)
        return f"{mean} ± {half}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confirmation:
    """One more training of a trial.

    Attributes:
        outcome: as in `records.OUTCOMES`.
        metrics: its figures by name.
        data: the whole record.
    """

    number: int
    seed: int
    outcome: str
    metrics: dict[str, float]
    data: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfirmedTrial:
    """A trial of which there are trainings with other seeds.

    Attributes:
        number: the trial's.
        values: each objective's figures, the search's own first, then by seed.
        intervals: by objective; none of a static one, which is the same for every seed.
        seeds: those that ended well, beside the study's own.
        failed: outcome by seed, of those that did not.
        unresolved: the trials with which it cannot be ranked → the objectives that say so.
    """

    number: int
    values: dict[str, tuple[float, ...]]
    intervals: dict[str, Interval]
    seeds: tuple[int, ...]
    failed: dict[int, str]
    unresolved: dict[int, tuple[str, ...]]

    @property
    def unresolved_text(self) -> str:
        """The trials with which it cannot be ranked: `3, 7`."""
        return ", ".join(map(str, self.unresolved))

    def to_dict(self) -> dict[str, Any]:
        """JSON data, with the interval's ends beside its mean and half."""
        return {
            "trial": self.number,
            "level": LEVEL,
            "seeds": list(self.seeds),
            "failed": {str(seed): outcome for seed, outcome in self.failed.items()},
            "objectives": {
                name: {**dataclasses.asdict(found), "values": list(self.values[name])}
                for name, found in self.intervals.items()
            },
            "unresolved": {str(number): list(why) for number, why in self.unresolved.items()},
        }


def interval(values: Sequence[float]) -> Interval:
    """The mean of figures with its two-sided 95 % t interval.

    Args:
        values: at least one.
    """
    import statistics  # not for those who only list studies

    mean = float(statistics.mean(map(float, values)))  # exact: equal figures have their own mean
    if len(values) < 2:
        return Interval(mean=mean, half=None, count=len(values))
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean=mean, half=t_quantile(len(values) - 1) * error, count=len(values))


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """The t that a Student variable stays within, on both sides, with probability `level`.

    Args:
        freedom: whole degrees of freedom, at least 1.
        level: between 0 and 1, both left out.

    The distribution's closed form for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and
    26.7.4) in the angle atan(t / √freedom), inverted by halving.
    """
    if freedom < 1 or not 0 < level < 1:
        raise ValueError(f"no t quantile for {freedom} degrees of freedom at {level}")
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """The probability of |t| below √freedom · tan(angle)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for power in range(odd, freedom - 1, 2):  # the exponents of the cosine
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def read_confirmations(study: Path) -> list[Confirmation]:
    """Every further training on record, by trial and seed; damaged records have that outcome.

    Args:
        study: its folder.
    """
    paths = (study / FOLDER).glob("*/*/trial.json")
    named = [path for path in paths if path.parts[-2].isdigit() and path.parts[-3].isdigit()]
    return sorted(map(_read, named), key=lambda one: (one.number, one.seed))


def _read(path: Path) -> Confirmation:
    number, seed = int(path.parts[-3]), int(path.parts[-2])
    try:
        data = read_json(path)
        outcome, found = str(data["outcome"]), dict(data.get("metrics", {}))
        metrics = {name: float(value) for name, value in found.items()}
    except (WorkbenchError, KeyError, TypeError, ValueError) as error:
        data = {"outcome": "damaged", "reason": str(error)}
        outcome, metrics = "damaged", {}
    return Confirmation(number=number, seed=seed, outcome=outcome, metrics=metrics, data=data)


def repeated_objectives(study: Study) -> list[str]:
    """The objectives whose figures another seed may change: all but the static ones."""
    stages = study.data.get("stages", {})
    return [o.name for o in study.objectives if stages.get(o.name) != "static"]


def confirmed_trials(study: Study) -> list[ConfirmedTrial]:
    """The trials that were trained again, by number, each with its intervals.

    Those that are still at it, or ended badly every time, have one figure and no width.
    """
    names = repeated_objectives(study)
    own = {trial.number: trial for trial in study.trials() if trial.outcome == "complete"}
    found = []
    for number, group in itertools.groupby(read_confirmations(study.path), lambda c: c.number):
        if number in own:
            found.append(_confirmed(number, own[number].metrics, list(group), names))
    unresolved = {one.number: _unresolved(one, found) for one in found}
    return [dataclasses.replace(one, unresolved=unresolved[one.number]) for one in found]


def _confirmed(
    number: int, own: dict[str, float], again: list[Confirmation], names: list[str]
) -> ConfirmedTrial:
    good = [
        one
        for one in again
        if one.outcome == "complete" and all(name in one.metrics for name in names)
    ]
    values = {name: (own[name], *(one.metrics[name] for one in good)) for name in names}
    seeds = tuple(one.seed for one in good)
    return ConfirmedTrial(
        number=number,
        values=values,
        intervals={name: interval(figures) for name, figures in values.items()},
        seeds=seeds,
        failed={one.seed: one.outcome for one in again if one.seed not in seeds},
        unresolved={},
    )


def _unresolved(
    one: ConfirmedTrial, others: Sequence[ConfirmedTrial]
) -> dict[int, tuple[str, ...]]:
    """With whom a trial shares an overlap in an objective, unless every seed says that they tie."""
    shared = {
        other.number: tuple(
            name
            for name, mine in one.intervals.items()
            if mine.overlaps(other.intervals[name])
            and not (mine.half == 0.0 == other.intervals[name].half)
        )
        for other in others
        if other is not one
    }
    return {number: names for number, names in shared.items() if names}
