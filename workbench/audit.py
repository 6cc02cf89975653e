"""How far a study's cheap signals agree with its full trainings: rank correlations and flips.

A signal is any recorded figure that is not the objective itself: static, measured and synthetic
metrics, the figures of each rung, and trained metrics that were only reported. From records alone;
numpy, no torch.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from workbench.errors import FieldError, WorkbenchError
from workbench.metric import UNTRAINED
from workbench.rank_correlation import kendall_tau
from workbench.records import Objective, Study, Trial

LEVEL = 0.95
LEAST_RESAMPLES = 1000
FEW_TRIALS = 10  # below which a bootstrap interval is too narrow
LEAST_TRIALS = 3  # below which a resample is hardly ever of another order
FULL = ("trained", "quantized")  # the stages that need the full training
UNSEEN = ("stopped", "diverged", "out_of_memory", "timeout", "crashed", "error")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signal:
    """A figure that is there before a training ends, or beside its objectives.

    Attributes:
        name: the metric's; with the share of the training for a rung.
        kind: a stage, or `rung`.
        metric: the metric's name alone.
        values: by trial number.
    """

    name: str
    kind: str
    metric: str
    values: dict[int, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flip:
    """Two trials that a signal puts in the wrong order.

    Attributes:
        chosen, better: the trial that the signal prefers, and the one that training does.
        signal, objective: the figures of both, the chosen one's first.
        loss: how much worse the chosen one is, in the objective's unit.
    """

    chosen: int
    better: int
    signal: tuple[float, float]
    objective: tuple[float, float]
    loss: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """One signal against one objective.

    Attributes:
        trials: that have both.
        pairs: of them.
        tau: Kendall's tau-b of the figures; None where one side has no order.
        low, high: ends of its bootstrap interval; None where trials are too few.
        follows: 1 if a higher signal is read as a higher objective, else -1: 1 for the objective's
            own rungs, else tau's sign.
        flipped: how many pairs the signal, read so, orders differently.
        flips: the worst of them, by loss.
    """

    signal: str
    kind: str
    objective: str
    unit: str
    trials: int
    pairs: int
    tau: float | None
    low: float | None
    high: float | None
    follows: int
    flipped: int
    flips: tuple[Flip, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Audit:
    """What the records of a study say of its signals.

    Attributes:
        agreements: signal by signal, objective by objective.
        trials: that were trained to the end.
        missing: trials that were not, by outcome.
    """

    study: str
    agreements: tuple[Agreement, ...]
    trials: int
    missing: dict[str, int]
    resamples: int
    seed: int

    @property
    def warnings(self) -> list[str]:
        """Why the correlations may be wrong, for people."""
        found = []
        if self.trials < FEW_TRIALS:
            found.append(
                f"{_trials(self.trials)} trained to the end: the intervals of so few are too "
                "narrow."
            )
        bounded = [one for one in self.agreements if one.low is not None]
        few = [one for one in bounded if one.trials < FEW_TRIALS <= self.trials]
        if few:
            least = min(one.trials for one in few)
            found.append(
                f"{_names(few)}: known of {_trials(least)} only; such intervals are too narrow."
            )
        if same := [one for one in bounded if one.low == one.high]:
            found.append(
                f"{_names(same)}: an interval without width. The trials all agree on the order, so "
                "drawing from them shows no doubt; others need not agree."
            )
        if stopped := self.missing.get("stopped"):
            found.append(
                f"Selection bias: {_trials(stopped)} that rungs stopped have no full training and "
                "are missing here. They were stopped for their figures, so what is left is no "
                "fair sample: the correlations, those of rungs above all, may be too low or too "
                "high. A study without rungs has no such bias."
            )
        others = {name: count for name, count in self.missing.items() if name != "stopped"}
        if others:
            words = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in others.items())
            found.append(f"Also missing, for they failed: {words}.")
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON data, the warnings with it."""
        return {**dataclasses.asdict(self), "level": LEVEL, "warnings": self.warnings}


def audit(study: Study, *, flips: int = 3, resamples: int = 2000, seed: int = 0) -> Audit:
    """Compare every signal of a study with every objective of its full trainings.

    Args:
        flips: how many to list of each signal and objective.
        resamples: of the bootstrap over trials, at least 1,000.
        seed: of these.

    Raises:
        WorkbenchError: too few trials are complete, or no objective comes from training.
    """
    if resamples < LEAST_RESAMPLES:
        raise FieldError("resamples", f"must be at least {LEAST_RESAMPLES:,}, got {resamples}")
    if flips < 0:
        raise FieldError("flips", f"must not be negative, got {flips}")
    stages = _stages(study)
    objectives = _trained_objectives(study, stages)
    trials = study.trials()
    complete = [trial for trial in trials if trial.outcome == "complete"]
    if len(complete) < 2:
        raise WorkbenchError(
            f"study {study.name!r} has {_trials(len(complete))} trained to the end; an order needs "
            "at least 2."
        )
    outcomes = Counter(trial.outcome for trial in trials)
    agreements = tuple(
        _agreement(signal, objective, complete, flips, resamples, seed)
        for signal in _signals(complete, stages)
        for objective in objectives
        if (signal.kind, signal.metric) != (stages[objective.name], objective.name)
    )
    return Audit(
        study=study.name,
        agreements=agreements,
        trials=len(complete),
        missing={name: outcomes[name] for name in UNSEEN if outcomes[name]},
        resamples=resamples,
        seed=seed,
    )


def _names(agreements: Sequence[Agreement]) -> str:
    """The signals, each once."""
    return ", ".join(dict.fromkeys(one.signal for one in agreements))


def _trials(count: int) -> str:
    return "1 trial" if count == 1 else f"{count:,} trials"


def _stages(study: Study) -> Mapping[str, str]:
    stages = study.data.get("stages")
    if not isinstance(stages, dict):
        raise WorkbenchError(
            f"{study.path / 'study.json'} does not say which stage yields each metric ('stages'): "
            "resume the study once (workbench run), which writes it."
        )
    return stages


def _trained_objectives(study: Study, stages: Mapping[str, str]) -> list[Objective]:
    found = [o for o in study.objectives if stages.get(o.name) in FULL]
    if not found:
        raise WorkbenchError(
            f"no objective of study {study.name!r} comes from training: there is nothing that its "
            "cheap signals could be held against."
        )
    return found


def _signals(trials: Sequence[Trial], stages: Mapping[str, str]) -> list[Signal]:
    """From cheap to dear: what is known untrained, rung by rung, then what training yields."""
    order = (*UNTRAINED, "rung", *FULL)
    metrics = [
        Signal(
            name=name,
            kind=stage,
            metric=name,
            values={t.number: t.metrics[name] for t in trials if name in t.metrics},
        )
        for name, stage in stages.items()
    ]
    found = [*metrics, *_rung_signals(trials)]
    return sorted(found, key=lambda signal: order.index(signal.kind))


def _rung_signals(trials: Sequence[Trial]) -> list[Signal]:
    found: dict[tuple[float, str], dict[int, float]] = {}
    for trial in trials:
        for rung in trial.data.get("rungs", ()):
            for name, value in rung["metrics"].items():
                found.setdefault((rung["share"], name), {})[trial.number] = value
    return [
        Signal(name=f"{name} at {share:.4g}", kind="rung", metric=name, values=values)
        for (share, name), values in sorted(found.items())
    ]


def _agreement(
    signal: Signal,
    objective: Objective,
    trials: Sequence[Trial],
    flips: int,
    resamples: int,
    seed: int,
) -> Agreement:
    numbers = [trial.number for trial in trials if trial.number in signal.values]
    full = {trial.number: trial.metrics[objective.name] for trial in trials}
    first = [signal.values[number] for number in numbers]
    second = [full[number] for number in numbers]
    tau = kendall_tau(first, second)
    low, high = bootstrap(first, second, resamples, seed)
    own = signal.metric == objective.name
    follows = 1 if own or tau is None or tau >= 0 else -1
    wrong = _flips(numbers, first, second, follows, objective.sign)
    return Agreement(
        signal=signal.name,
        kind=signal.kind,
        objective=objective.name,
        unit=objective.unit,
        trials=len(numbers),
        pairs=len(numbers) * (len(numbers) - 1) // 2,
        tau=tau,
        low=low,
        high=high,
        follows=follows,
        flipped=len(wrong),
        flips=tuple(wrong[:flips]),
    )


def bootstrap(
    first: Sequence[float], second: Sequence[float], resamples: int, seed: int
) -> tuple[float | None, float | None]:
    """The ends of tau-b's 95 % percentile interval, trials drawn with replacement.

    A pair of a trial with itself is a tie on both sides. Resamples without an order are left out;
    the ends are None if that is all of them, or if the trials are fewer than three.
    """
    count = len(first)
    if count < LEAST_TRIALS:
        return None, None
    # How often each trial is in each resample; tau-b is a ratio of quadratic forms in that.
    draws_RN = np.random.default_rng(seed).multinomial(count, [1 / count] * count, resamples)
    weights_RN = draws_RN.astype(float)
    signs_NN, others_NN = (np.sign(np.subtract.outer(x, x)) for x in (first, second))

    def weighed(pairs_NN: Any) -> Any:
        return ((weights_RN @ pairs_NN) * weights_RN).sum(axis=1)

    ordered_R = weighed(abs(signs_NN)) * weighed(abs(others_NN))
    valid_R = ordered_R > 0
    if not valid_R.any():
        return None, None
    taus = weighed(signs_NN * others_NN)[valid_R] / np.sqrt(ordered_R[valid_R])
    low, high = np.quantile(taus, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _flips(
    numbers: Sequence[int],
    first: Sequence[float],
    second: Sequence[float],
    follows: int,
    sign: float,
) -> list[Flip]:
    """The pairs that a signal orders differently, largest loss first, then by number.

    Args:
        sign: of the objective; 1 to minimize.
    """
    found = []
    for a, b in itertools.combinations(range(len(numbers)), 2):
        if follows * (first[a] - first[b]) * (second[a] - second[b]) >= 0:
            continue
        # The better one by training is the one that the signal does not prefer.
        good, bad = (a, b) if sign * second[a] < sign * second[b] else (b, a)
        found.append(
            Flip(
                chosen=numbers[bad],
                better=numbers[good],
                signal=(first[bad], first[good]),
                objective=(second[bad], second[good]),
                loss=abs(second[bad] - second[good]),
            )
        )
    return sorted(found, key=lambda flip: (-flip.loss, flip.chosen, flip.better))
