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

from workbench.errors import PatchError
from workbench.guard import Guard, guarded
from workbench.latency_drawing import RandomSuggester
from workbench.layout import Layout
from workbench.pareto import pareto_front
from workbench.space import Space
from workbench.surrogate import Array, farthest, features, most_hoped, table
from workbench.trial import Workplace, static_figures
from workbench.verdict import InfeasibleError, Verdict

Exact = Callable[[Layout], Mapping[str, float] | None]
REMEMBERED = 4096  # candidates; each is a few kilobytes, and a study may look at millions


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
        except (Exception, SystemExit):  # values that do not fit together, or a plugin's fault
            return None
        if layout.hash not in self._judged:
            exact = self._exact(layout)
            if len(self._judged) >= REMEMBERED:
                del self._judged[next(iter(self._judged))]
            self._judged[layout.hash] = None if exact is None else self._candidate(layout, exact)
        known = self._judged[layout.hash]
        return None if known is None else dataclasses.replace(known, params=recorder.params)

    def forget(self) -> None:
        """Judge everything anew from now on."""
        self._judged.clear()
        self._trials.clear()

    def _candidate(self, layout: Layout, exact: Mapping[str, float]) -> Candidate:
        numbers = features(layout)
        for name, value in exact.items():
            if math.isfinite(value):
                numbers[f"exact {name}"] = math.log(value) if value > 0 else value
        among = {name: exact[name] for name in self.objectives if name in exact}
        return Candidate({}, layout.hash, numbers, among)

    def of(self, trial: FrozenTrial) -> Candidate | None:
        """What a trial of the study tried; None if that was nothing feasible, or no layout yet."""
        if trial.number not in self._trials:
            if not trial.params and not trial.state.is_finished():
                return None  # not suggested yet; one that waits has its parameters elsewhere
            found = self.draw(Near(trial.params, 0.0, random.Random(0)))
            if found is not None and not found.params.items() <= trial.params.items():
                found = None  # it ended before its layout was whole, or has values of another space
            self._trials[trial.number] = found
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
    except (Exception, SystemExit):
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
    values are random. A chosen value that the space does not hold is the trial's error.

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
            return _held(param_distribution, param_name, self._params[param_name])
        return self._random.sample_independent(study, trial, param_name, param_distribution)


def _held(distribution: BaseDistribution, name: str, value: Any) -> Any:
    """The value as the distribution has it: a number of numpy's becomes one of Python's."""
    inside = distribution.to_internal_repr(value)
    if not distribution._contains(inside):
        raise ValueError(f"the sampler chose {name} = {value!r}, which is not in {distribution}")
    return distribution.to_external_repr(inside)


def look(study: Study, view: View, guard: Guard) -> None:
    """Let the study's sampler choose a layout, if it is one that sees them.

    What plugins change meanwhile of what all share is put back, and no trial's fault: a trial of
    the candidate that did it shows so. What was judged until then is judged anew.

    Args:
        guard: of the study's plugins; it is renewed.
    """
    if not isinstance(study.sampler, LayoutSampler):
        return
    try:
        with guarded("a candidate", guard=guard):
            study.sampler.look(study, view)
    except PatchError:
        view.forget()


class SurrogateSampler(LayoutSampler):
    """Tries the layout that is hoped to add most to the front, by a model of the ones that ended.

    Of `candidates` layouts, half of them drawn at random and half near those on the front, the
    objectives that a layout alone tells are exact; the others are thought of by a Gaussian process
    (`surrogate.regress`), and hoped to be `optimism` standard deviations better than its mean.
    What is being judged counts as if it ended at the mean; what failed or violated a constraint,
    as if it were the worst in all that is not exact. Positive figures that are minimized go in by
    their logarithms, so that a front is covered evenly. Layouts that were tried are no candidates.

    Args:
        startup: complete trials before which candidates are taken for being unlike those tried.
        candidates: layouts that are looked at for each suggestion.
        optimism: in standard deviations, at least 0.
        known: most trials that the model is made of: the latest, and all of the front; and as
            many at most that failed.

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
        tried = [(trial, one) for trial in trials if (one := view.of(trial)) is not None]
        ended = self._ended(study, view, trials)
        parents = [one.candidate.params for one in ended if one.on_front]
        found = self._candidates(view, {one.layout_hash for _, one in tried}, parents)
        if not found:
            return None
        if len(ended) < self.startup:
            return found[_farthest([one for _, one in tried], found)].params
        running = [one for trial, one in tried if trial.state == TrialState.RUNNING]
        signs = dict(zip(view.objectives, _signs(study), strict=True))
        ended += self._failed(tried, ended, signs)
        return found[_best(ended, running, found, signs, self.optimism)].params

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

    def _failed(
        self,
        tried: Sequence[tuple[FrozenTrial, Candidate]],
        ended: Sequence[_Ended],
        signs: Mapping[str, float],
    ) -> list[_Ended]:
        """Layouts that gave no figures, or the model would be drawn to what nobody knows of."""
        worst_K = np.max([one.point_K for one in ended], axis=0)
        alive = (TrialState.COMPLETE, TrialState.RUNNING)  # of a later try, say
        others = {one.layout_hash for trial, one in tried if trial.state in alive}
        failed: dict[str, _Ended] = {}
        for trial, one in tried:
            if _has_failed(trial) and one.layout_hash not in others:
                exact_K = _exact_point(one, signs)
                point_K = np.where(np.isfinite(exact_K), exact_K, worst_K)
                failed[one.layout_hash] = _Ended(one, point_K, on_front=False, failed=True)
        return list(failed.values())[-self.known :]

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
    failed: bool = False


def _has_failed(trial: FrozenTrial) -> bool:
    """Whether a trial ended without figures; one that was stopped at a rung had some."""
    violated = any(violation > 0 for violation in trial.constraints.values())
    return trial.state == TrialState.FAIL or (trial.state == TrialState.PRUNED and violated)


def _signs(study: Study) -> list[float]:
    """Of each objective, what makes it one that is minimized."""
    return [-1.0 if d == StudyDirection.MAXIMIZE else 1.0 for d in study.directions]


def _minimized(study: Study, values: Sequence[float]) -> list[float]:
    return [sign * value for sign, value in zip(_signs(study), values, strict=True)]


def _farthest(known: Sequence[Candidate], found: Sequence[Candidate]) -> int:
    """Which of the candidates is least like all known ones."""
    return farthest(table([one.features for one in (*known, *found)]), len(known))


def _best(
    ended: Sequence[_Ended],
    running: Sequence[Candidate],
    found: Sequence[Candidate],
    signs: Mapping[str, float],
    optimism: float,
) -> int:
    """Which of the candidates to try, by `surrogate.most_hoped`."""
    others = [*running, *found]
    return most_hoped(
        table([candidate.features for candidate in (*(e.candidate for e in ended), *others)]),
        np.array([one.point_K for one in ended]),
        np.array([_exact_point(one, signs) for one in others]),
        judged_N=np.array([not one.failed for one in ended]),
        running=len(running),
        optimism=optimism,
    )


def _exact_point(candidate: Candidate, signs: Mapping[str, float]) -> Array:
    """What is exact of a candidate, minimized; NaN for the other objectives."""
    return np.array([sign * candidate.exact.get(name, np.nan) for name, sign in signs.items()])
