"""The oracle: every layout of a small space judged, and how near a study's search came to that.

    runs/<study>/oracle/study.json         a study's record, named `<study>/oracle`: every command
    runs/<study>/oracle/trials/00007/      and reader of records takes it

A trial's number there is its layout's place in the enumeration. Weights are not kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from workbench.builder import default_builder
from workbench.enumeration import LIMIT, Enumeration, Suggested, enumerate_space
from workbench.environment import resolve_device
from workbench.errors import FieldError, WorkbenchError
from workbench.executors import Executor, Task, open_executor
from workbench.files import write_json
from workbench.identity import identity, refuse_change
from workbench.ledger import is_judged
from workbench.parents import joined
from workbench.records import Study, Trial, runs_folder
from workbench.regret import Regret
from workbench.reporter import Reporter
from workbench.rungs import CONTINUE, Rungs
from workbench.space import Space
from workbench.study import study_record
from workbench.study_config import StudyConfig
from workbench.trial import Workplace, judge_static
from workbench.verdict import PAUSED, Verdict

FOLDER = "oracle"
TAKEN = ("complete", "infeasible", "diverged")  # a study's verdicts that would be the same here
AGAIN = ("interrupted", "running", "damaged")
KEPT = ("trial.json", "layout.json", "curve.jsonl", "log.txt")
PATIENCE = 60.0  # seconds between looks at how many slots the executor has


class Oracle:
    """The truth about one study's space, as far as it is judged.

    Args:
        config: the study's.
        limit: of layouts.
        study: the study's folder; `config.name` in the runs folder if left out.

    Attributes:
        enumeration: every layout.
        folder: of the records.

    Raises:
        WorkbenchError: the space is too large or continuous, or what was judged earlier would not
            compare with what would be judged now.
    """

    def __init__(
        self,
        config: StudyConfig,
        runs: str | Path | None = None,
        limit: int = LIMIT,
        *,
        study: Path | None = None,
    ) -> None:
        builder = default_builder(config.plugin_dirs)
        self.config = config
        self.folder = (study or runs_folder(runs) / config.name) / FOLDER
        self.cache_dir = self.folder.parent.parent / ".cache"
        try:
            device = resolve_device(config.runtime.device)
        except FieldError as error:
            raise error.within("runtime") from None
        self.place = Workplace(config, builder, device, self.cache_dir)
        self.space = Space(config.space, builder, self.place.data.vocab_size)
        metrics, steps = self.place.metrics, self.place.training.steps
        self.rungs = Rungs(config.rungs, metrics, config.objectives, steps)
        self.place.probe()
        self.enumeration: Enumeration = enumerate_space(self.space, limit)
        self.facts = identity(self.place, self.space)
        for folder in (self.folder.parent, self.folder):
            refuse_change(folder, self.facts, config.name)

    def judged(self) -> dict[int, Trial]:
        """Trials whose verdict stands, by number."""
        if not (self.folder / "study.json").exists():
            return {}
        trials = Study(self.folder).trials()
        return {trial.number: trial for trial in trials if self._stands(trial)}

    def missing(self) -> list[int]:
        """Numbers of the layouts that are not judged."""
        judged = self.judged()
        return [n for n in range(len(self.enumeration.layouts)) if n not in judged]

    def to_judge(self) -> list[int]:
        """Numbers of the layouts that neither the oracle nor the study has judged."""
        known = self._known()
        layouts = self.enumeration.layouts
        return [n for n in self.missing() if layouts[n].layout.hash not in known]

    def _stands(self, trial: Trial) -> bool:
        if trial.outcome == "crashed":
            return int(trial.data["attempt"]) >= self.config.budget.retries
        return trial.outcome not in AGAIN

    def tabulate(self, reporter: Reporter | None = None) -> Study:
        """Judge every layout that is not judged yet; what the study itself judged is taken over.

        Raises:
            WorkbenchError: another process is at it, or no layout can be judged at all.
            KeyboardInterrupt: Ctrl-C; a later call goes on with the layouts that are left.
        """
        reporter = reporter or Reporter()
        with joined(self.folder) as parent:
            if others := parent.others():
                raise WorkbenchError(
                    f"another process judges the layouts of {self.config.name} already "
                    f"({', '.join(others)}): wait for it, or end it."
                )
            with parent.exclusive():  # a new one is not locked before its turn ends
                parent.forget(parent.dead())
            record = study_record(self.place, self.space, self.facts)
            name = f"{self.config.name}/{FOLDER}"
            write_json(self.folder / "study.json", {"name": name, **record})
            self._take_over()
            waiting = self.missing()
            total = len(self.enumeration.layouts)
            if waiting:
                done = total - len(waiting)
                reporter.started(Study(self.folder), done > 0, done, total)
                with contextlib.closing(open_executor(self.place, self.cache_dir)) as executor:
                    _Judging(self, executor, reporter).run(waiting)
        return Study(self.folder)

    def path(self, number: int) -> Path:
        """A layout's folder."""
        return self.folder / "trials" / f"{number:05d}"

    def _take_over(self) -> None:
        """Copy the verdicts of the study's own trials."""
        known = self._known()
        for number in self.missing():
            suggested = self.enumeration.layouts[number]
            trial = known.get(suggested.layout.hash)
            if trial is not None:
                facts = {"number": number, "params": suggested.params, "taken_from": trial.name}
                write_json(self.path(number) / "layout.json", suggested.layout.to_dict())
                write_json(self.path(number) / "trial.json", {**trial.data, **facts})

    def _known(self) -> dict[str, Trial]:
        """Trials of the study by layout hash, where the oracle's verdict would be the same."""
        if not (self.folder.parent / "study.json").exists():
            return {}
        return {
            trial.data["layout_hash"]: trial
            for trial in Study(self.folder.parent).trials()
            if trial.outcome in TAKEN and "layout_hash" in trial.data
        }


@dataclasses.dataclass
class _Flight:
    """A layout that is being judged."""

    suggested: Suggested
    record: dict[str, Any]
    verdict: Verdict
    since: float


class _Judging:
    """Judges layouts one after another, as many at a time as the executor has slots."""

    def __init__(self, oracle: Oracle, executor: Executor, reporter: Reporter) -> None:
        self.oracle = oracle
        self.place = oracle.place
        self.executor = executor
        self.reporter = reporter
        self.flights: dict[int, _Flight] = {}

    def run(self, numbers: list[int]) -> None:
        waiting = numbers[::-1]
        while waiting or self.flights:
            while waiting and len(self.flights) < self.executor.slots:
                self._begin(waiting.pop())
            if waiting or self.flights:
                for number, verdict in self.executor.wait(self._heard, PATIENCE):
                    self._ended(number, verdict)

    def _begin(self, number: int) -> None:
        suggested = self.oracle.enumeration.layouts[number]
        folder = self.oracle.path(number)
        record: dict[str, Any] = {
            "number": number,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "params": suggested.params,
            "pattern": self.place.builder.pattern(suggested.layout),
            "layout_hash": suggested.layout.hash,
            "attempt": _attempts(folder),
        }
        shutil.rmtree(folder, ignore_errors=True)  # what a stopped run left half done
        write_json(folder / "layout.json", suggested.layout.to_dict())
        since = time.monotonic()
        verdict = judge_static(self.place, suggested.layout, folder)
        flight = self.flights[number] = _Flight(suggested, record, verdict, since)
        if verdict.outcome != "complete":
            self._finish(number)
            return
        self.reporter.trial_started(number, record["pattern"])
        self._submit(number, flight)

    def _submit(self, number: int, flight: _Flight) -> None:
        passed = flight.verdict.rungs
        self.executor.submit(
            Task(
                number=number,
                layout=flight.suggested.layout,
                folder=self.oracle.path(number),
                begun=flight.verdict.to_dict() if passed else None,
                stop=self.oracle.rungs.next_step(passed),
            )
        )

    def _heard(self, number: int, message: dict[str, Any]) -> None:
        if "phase" in message:
            self.reporter.trial_phase(number, message["phase"])
        else:
            steps = self.place.training.steps
            step = round(message["progress"] * steps)
            self.reporter.trial_progress(number, step, steps, message["loss"])

    def _ended(self, number: int, verdict: Verdict) -> None:
        """Go on from a rung, whatever its figures: the truth stops nobody."""
        flight = self.flights[number]
        flight.verdict.update(verdict)
        if verdict.outcome != PAUSED:
            self._finish(number)
            return
        rungs = flight.verdict.rungs
        share = self.oracle.config.rungs.at[len(rungs) - 1]
        rungs[-1] = {"share": share, **rungs[-1], "decision": CONTINUE}
        self._submit(number, flight)

    def _finish(self, number: int) -> None:
        flight, folder = self.flights.pop(number), self.oracle.path(number)
        verdict = flight.verdict
        if verdict.outcome == "interrupted":  # a full disk: the machine's fault, not the layout's
            raise WorkbenchError(f"{verdict.reason}. Mend that and run the same command again.")
        record = {**flight.record, **verdict.to_dict()}
        record["environment"] = record["details"].pop("environment", {})
        record["seconds"] = round(time.monotonic() - flight.since, 3)
        write_json(folder / "trial.json", record)
        for path in folder.iterdir():
            if path.name not in KEPT:
                path.unlink()
        self.reporter.trial_finished(Trial(f"{self.oracle.config.name}/{FOLDER}", folder))


def _attempts(folder: Path) -> int:
    """How often a layout's worker died on it in earlier runs."""
    try:
        trial = Trial("", folder)
    except WorkbenchError:
        return 0
    return int(trial.data.get("attempt", 0)) + (trial.outcome == "crashed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One judged trial of a search.

    Attributes:
        number: the trial's.
        trainings: how many whole trainings the search had spent after it.
        regret: hypervolume regret after it.
    """

    number: int
    trainings: float
    regret: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A search against the exhaustive truth.

    Attributes:
        outcomes: of all layouts.
        front: the true one, by the first objective.
        missed: those of it whose figures the search did not reach.
        evaluations: in the order of the study's numbers.
    """

    outcomes: dict[str, int]
    front: list[Trial]
    missed: list[Trial]
    evaluations: list[Evaluation]


def report(study: Study, truth: Study) -> Report:
    """Compare a study with the exhaustive record of its space (`Oracle.tabulate`).

    What the search found counts by the oracle's figures, so that noise in measured objectives
    makes nobody look better than the truth. A trial stopped at a rung found nothing, and spent the
    share of a training that it had.

    Raises:
        WorkbenchError: no layout of the space is complete, or no trial of the study is judged.
    """
    trials = truth.trials()
    complete = [trial for trial in trials if trial.outcome == "complete"]
    points = {str(t.data["layout_hash"]): _point(truth, t) for t in complete}
    regret = Regret(list(points.values()))
    judged = judged_trials(study)
    found = [
        points.get(trial.data.get("layout_hash", "")) if trial.outcome == "complete" else None
        for trial in judged
    ]
    spent = 0.0
    evaluations = []
    for trial, left in zip(judged, regret.curve(found), strict=True):
        spent += trainings(trial.data)
        evaluations.append(Evaluation(number=trial.number, trainings=spent, regret=left))
    front = truth.front_trials()
    reached = {point for point in found if point is not None}
    missed = [t for t in front if points[str(t.data["layout_hash"])] not in reached]
    outcomes = Counter(trial.outcome for trial in trials)
    return Report(outcomes=dict(outcomes), front=front, missed=missed, evaluations=evaluations)


def judged_trials(study: Study) -> list[Trial]:
    """What a search has to be compared, by number.

    Raises:
        WorkbenchError: nothing.
    """
    judged = [trial for trial in study.trials() if is_judged(trial)]
    if not judged:
        raise WorkbenchError(
            f"no trial of study {study.name!r} is judged yet: workbench run its file first."
        )
    return judged


def trainings(record: Mapping[str, Any]) -> float:
    """The share of a whole training that a judged trial spent, as far as its record tells."""
    if record["outcome"] == "stopped":
        return float(record["rungs"][-1]["share"])
    return 1.0


def _point(study: Study, trial: Trial) -> tuple[float, ...]:
    """Its objectives, minimized."""
    return tuple(objective.sign * trial.metrics[objective.name] for objective in study.objectives)
