"""Samplers that see layouts, where Optuna's see parameters.

A study's `[sampler]` may name any of Optuna's samplers. One that is a `LayoutSampler` is shown the
study's space besides: it may draw layouts from it, thousands if it likes, and ask for the figures
that are exact before anything is trained. `SurrogateSampler` does so.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from workbench.errors import WorkbenchError
from workbench.latency_drawing import RandomSuggester
from workbench.layout import Layout
from workbench.pareto import pareto_front
from workbench.space import Space
from workbench.surrogate import Array, features, gains, regress, table
from workbench.trial import Workplace, static_figures
from workbench.verdict import InfeasibleError, Verdict

Exact = Callable[[Layout], Mapping[str, float] | None]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layout that could be tried.

    Attributes:
        params: that suggest it.
        exact: the static figures among the objectives, by name.
    """

    params: Mapping[str, Any]
    layout_hash: str
    features: Mapping[str, float]
    exact: Mapping[str, float]


class View:
    """What a study shows its sampler.

    Args:
        space: of the study.
        exact: a layout's static figures; None where it is not feasible, none where that cannot be
            told, for then a trial has to.
        objectives: names, in Optuna's order.
    """

    def __init__(self, space: Space, exact: Exact, objectives: Sequence[str]) -> None:
        self.objectives = tuple(objectives)
        self._space, self._exact = space, exact
        self._judged: dict[str, Candidate | None] = {}  # by layout hash
        self._trials: dict[int, Candidate | None] = {}  # by number

    def draw(self, suggester: Any) -> Candidate | None:
        """What a suggester's answers make; None where that cannot be built or is not feasible.

        Args:
            suggester: has Optuna's `suggest_*` methods.
        """
        recorder = _Recorder(suggester)
        try:
            layout = self._space.suggest(recorder)
        except WorkbenchError:  # values that do not fit together
            return None
        if layout.hash not in self._judged:
            exact = self._exact(layout)
            self._judged[layout.hash] = None if exact is None else self._candidate(layout, exact)
        known = self._judged[layout.hash]
        return None if known is None else dataclasses.replace(known, params=recorder.params)

    def _candidate(self, layout: Layout, exact: Mapping[str, float]) -> Candidate:
        numbers = features(layout)
        for name, value in exact.items():
            if math.isfinite(value):
                numbers[f"exact {name}"] = math.log(value) if value > 0 else value
        among = {name: exact[name] for name in self.objectives if name in exact}
        return Candidate({}, layout.hash, numbers, among)

    def of(self, trial: FrozenTrial) -> Candidate | None:
        """What a trial of the study tried; None if that was nothing feasible."""
        if trial.number not in self._trials:
            if not trial.params and trial.state == TrialState.RUNNING:
                return None  # not suggested yet
            self._trials[trial.number] = self.draw(Near(trial.params, 0.0, random.Random(0)))
        return self._trials[trial.number]


def exact_figures(place: Workplace, layout: Layout) -> dict[str, float] | None:
    """What the static stage would say of a layout that is not a trial yet.

    Returns:
        Its figures; None if it is infeasible, and none if it fails otherwise: a trial shows how.
    """
    verdict = Verdict()
    try:
        static_figures(place, layout, verdict)
    except InfeasibleError:
        return None
    except Exception:
        return {}
    return verdict.metrics


class _Recorder:
    """Keeps what a suggester answers."""

    def __init__(self, suggester: Any) -> None:
        self._suggester = suggester
        self.params: dict[str, Any] = {}

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._keep(name, self._suggester.suggest_categorical(name, choices))

    def suggest_int(self, name: str, low: int, high: int, **how: Any) -> int:
        return int(self._keep(name, self._suggester.suggest_int(name, low, high, **how)))

    def suggest_float(self, name: str, low: float, high: float, **how: Any) -> float:
        return float(self._keep(name, self._suggester.suggest_float(name, low, high, **how)))

    def _keep(self, name: str, value: Any) -> Any:
        self.params[name] = value
        return value


class Near(RandomSuggester):
    """Suggests what another layout had, but for a share of the values, and those that it lacks."""

    def __init__(self, params: Mapping[str, Any], changed: float, dice: random.Random) -> None:
        super().__init__(dice)
        self._params, self._changed = params, changed

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        if self._keeps(name) and self._params[name] in choices:
            return self._params[name]
        return super().suggest_categorical(name, choices)

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        if self._keeps(name) and low <= self._params[name] <= high:
            return int(self._params[name])
        return super().suggest_int(name, low, high, step=step, log=log)

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None, log: bool
    ) -> float:
        if self._keeps(name) and low <= self._params[name] <= high:
            return float(self._params[name])
        return super().suggest_float(name, low, high, step=step, log=log)

    def _keeps(self, name: str) -> bool:
        return name in self._params and self.dice.random() >= self._changed


class LayoutSampler(BaseSampler):
    """A sampler that chooses a whole layout before its parameters are asked for.

    Subclasses give `choose`. Where it gives None, and for a parameter that it did not choose,
    values are random.

    Args:
        seed: of every draw.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._random = RandomSampler(seed)
        self.dice = random.Random(seed)
        self._params: Mapping[str, Any] = {}

    def choose(self, study: Study, view: View) -> Mapping[str, Any] | None:
        """The parameters of the layout to try next."""
        raise NotImplementedError

    def look(self, study: Study, view: View) -> None:
        """Choose; called before a trial's first parameter is asked for."""
        self._params = self.choose(study, view) or {}

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        if param_name in self._params:
            return self._params[param_name]
        return self._random.sample_independent(study, trial, param_name, param_distribution)


class SurrogateSampler(LayoutSampler):
    """Tries the layout that is hoped to add most to the front, by a model of the ones that ended.

    Of `candidates` layouts, half of them drawn at random and half near those on the front, the
    objectives that a layout alone tells are exact; the others are thought of by a Gaussian process
    (`surrogate.regress`), and hoped to be `optimism` standard deviations better than its mean.
    What is being judged counts as if it ended at the mean. Positive figures go in by their
    logarithms, so that a front is covered evenly. Layouts that were tried are no candidates.

    Args:
        startup: complete trials before which candidates are taken for being unlike those tried.
        candidates: layouts that are looked at for each suggestion.
        optimism: in standard deviations, at least 0.
        known: most trials that the model is made of: the latest, and all of the front.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        seed: int | None = None,
        *,
        startup: int = 5,
        candidates: int = 64,
        optimism: float = 1.0,
        known: int = 300,
    ) -> None:
        super().__init__(seed)
        if min(startup, candidates, known) < 1 or not optimism >= 0:
            raise ValueError("startup, candidates and known are at least 1, optimism at least 0")
        self.startup, self.candidates = startup, candidates
        self.optimism, self.known = optimism, known

    def choose(self, study: Study, view: View) -> Mapping[str, Any] | None:
        trials = study.get_trials(deepcopy=False)
        tried = {c.layout_hash for trial in trials if (c := view.of(trial)) is not None}
        ended = self._ended(study, view, trials)
        parents = [one.candidate.params for one in ended if one.on_front]
        found = self._candidates(view, tried, parents)
        if not found:
            return None
        if len(ended) < self.startup:
            known = [one for trial in trials if (one := view.of(trial)) is not None]
            return found[_farthest(known, found)].params
        running = [
            candidate
            for trial in trials
            if trial.state == TrialState.RUNNING and (candidate := view.of(trial)) is not None
        ]
        return found[_best(ended, running, found, view, study, self.optimism)].params

    def _ended(self, study: Study, view: View, trials: Sequence[FrozenTrial]) -> list[_Ended]:
        """The complete trials that the model is made of, those on the front marked."""
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        points = [_minimized(study, trial.values) for trial in complete]
        points_NK = np.array(points, dtype=np.float64).reshape(len(points), len(view.objectives))
        front = set(pareto_front(points_NK.tolist()) if points else ())
        latest = range(max(0, len(complete) - self.known), len(complete))
        ended = []
        for index in sorted(front.union(latest)):
            candidate = view.of(complete[index])
            if candidate is not None and np.isfinite(points_NK[index]).all():
                ended.append(_Ended(candidate, points_NK[index], index in front))
        return ended

    def _candidates(
        self, view: View, tried: set[str], parents: Sequence[Mapping[str, Any]]
    ) -> list[Candidate]:
        """New feasible layouts, each once."""
        found: dict[str, Candidate] = {}
        for index in range(4 * self.candidates):
            if len(found) == self.candidates:
                break
            suggester = RandomSuggester(self.dice)
            if parents and index % 2:
                changed = self.dice.choice((0.1, 0.3))
                suggester = Near(self.dice.choice(parents), changed, self.dice)
            candidate = view.draw(suggester)
            if candidate is not None and candidate.layout_hash not in tried:
                found.setdefault(candidate.layout_hash, candidate)
        return list(found.values())


@dataclasses.dataclass(frozen=True)
class _Ended:
    candidate: Candidate
    point_K: Array
    on_front: bool


def _minimized(study: Study, values: Sequence[float]) -> list[float]:
    signs = [1.0 if d == StudyDirection.MINIMIZE else -1.0 for d in study.directions]
    return [sign * value for sign, value in zip(signs, values, strict=True)]


def _farthest(known: Sequence[Candidate], found: Sequence[Candidate]) -> int:
    """Which of the candidates is least like all known ones; of none known, like the others."""
    x_NF = table([candidate.features for candidate in (*known, *found)])
    new_MF, old_NF = x_NF[len(known) :], x_NF[: len(known)]
    if not known:
        return int(np.argmin((new_MF**2).sum(1)))
    distances_MN = ((new_MF[:, None] - old_NF) ** 2).sum(-1)
    return int(np.argmax(distances_MN.min(1)))


def _best(
    ended: Sequence[_Ended],
    running: Sequence[Candidate],
    found: Sequence[Candidate],
    view: View,
    study: Study,
    optimism: float,
) -> int:
    """Which of the candidates is hoped to add most; the least known one if none adds anything."""
    known = len(ended)
    others = [*running, *found]
    x_NF = table([candidate.features for candidate in (*(e.candidate for e in ended), *others)])
    known_NK = np.array([one.point_K for one in ended])
    means, hopes, doubts = [], [], np.zeros(len(others))
    for k, name in enumerate(view.objectives):
        sign = -1.0 if study.directions[k] == StudyDirection.MAXIMIZE else 1.0
        exact_M = sign * np.array([c.exact.get(name, np.nan) for c in others], dtype=np.float64)
        told_M = np.isfinite(exact_M)
        if (known_NK[:, k] > 0).all() and (exact_M[told_M] > 0).all():
            known_NK[:, k], exact_M[told_M] = np.log(known_NK[:, k]), np.log(exact_M[told_M])
        mean_M, deviation_M = exact_M, np.zeros(len(others))
        if not told_M.all():
            belief = regress(x_NF[:known], known_NK[:, k], x_NF[known:])
            mean_M = np.where(told_M, exact_M, belief.mean)
            deviation_M = np.where(told_M, 0.0, belief.deviation)
        means.append(mean_M)
        hopes.append(mean_M - optimism * deviation_M)
        doubts += deviation_M / (known_NK[:, k].std() or 1.0)
    first = len(running)
    means_MK, hopes_MK = np.stack(means, 1), np.stack(hopes, 1)
    gain_M = gains(np.vstack([known_NK, means_MK[:first]]), hopes_MK[first:])
    return int(np.argmax(gain_M if gain_M.max() > 0 else doubts[first:]))
