"""Runs a study: create or resume, ask, judge, record, tell. This process is the only writer."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import SQLAlchemyError

from workbench import storage
from workbench.builder import default_builder
from workbench.environment import resolve_device
from workbench.errors import DiskError, WorkbenchError
from workbench.executors import Executor, InlineExecutor, Job, ProcessExecutor
from workbench.files import make_folder, write_json
from workbench.identity import identity, refuse_change, used_plugins
from workbench.layout import Layout
from workbench.ledger import JUDGED, UNBUILDABLE, Ledger, objectives_of, study_facts
from workbench.records import Study, Trial, runs_folder
from workbench.space import Space
from workbench.study_config import StudyConfig
from workbench.trial import Verdict, Workplace, judge_static, verdict_of

__all__ = ["JUDGED", "Reporter", "run_study"]

MAX_STALE = 100  # suggestions in a row without a new layout before the space counts as exhausted


class Reporter:
    """What a study says while it runs; the command line draws it. Override what you need."""

    def started(self, study: Study, resumed: bool, judged: int, goal: int) -> None:
        """The study is open; `judged` of `goal` trials are done already."""

    def trial_started(self, number: int, pattern: str) -> None:
        """A trial passed the static stage and goes to the executor."""

    def trial_progress(self, number: int, share: float, loss: float) -> None:
        """Training is `share` of the way, at a loss in nats a token."""

    def trial_finished(self, trial: Trial) -> None:
        """A trial's record is complete, whatever its outcome."""


def run_study(
    config: StudyConfig, runs: str | Path | None = None, reporter: Reporter | None = None
) -> Study:
    """Run a study up to its budget, resuming what is there; returns its records.

    Raises:
        WorkbenchError: a mistake in the study (before any work), a folder that holds another
            study, or one that another process is running.
        KeyboardInterrupt: Ctrl-C; the trial in flight is recorded and will run again.
    """
    builder = default_builder(config.plugin_dirs)
    device = resolve_device(config.runtime.device)
    folder = runs_folder(runs) / config.name
    cache_dir = runs_folder(runs) / ".cache"
    place = Workplace(config, builder, device, cache_dir)
    space = Space(config.space, builder, place.data.vocab_size)
    storage.make_sampler(config.sampler, 0)
    place.probe()
    facts = identity(place, space)
    refuse_change(folder, facts, config.name)
    with _locked(folder), storage.reporting_failures(folder):
        runner = _Runner(place, space, folder, reporter or Reporter())
        runner.open(facts)
        with contextlib.closing(_executor(place, cache_dir)) as executor:
            runner.run(executor)
    return Study(folder)


def _executor(place: Workplace, cache_dir: Path) -> Executor:
    if place.config.runtime.executor == "inline":
        return InlineExecutor(place)
    return ProcessExecutor(Job(config=place.config, device=place.device, cache_dir=cache_dir))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the study's folder; the lock goes with the process, however it ends."""
    make_folder(folder)
    try:
        lock = (folder / "lock").open("a")
    except OSError as error:
        raise DiskError(f"cannot write to {folder}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkbenchError(
                f"another process is running the study in {folder}: wait for it, or stop it."
            ) from None
        yield


class _Runner:
    """One run of a study."""

    def __init__(self, place: Workplace, space: Space, folder: Path, reporter: Reporter) -> None:
        self.place = place
        self.config = place.config
        self.space = space
        self.reporter = reporter
        objectives = objectives_of(place.metrics, self.config.objectives)
        self.ledger = Ledger(folder, objectives, self.config.budget.retries)
        self.plugins = used_plugins(self.config, place.builder)
        self.refusals: Counter[str] = Counter()

    def open(self, facts: dict[str, Any]) -> None:
        """Open the books and say where the study stands."""
        loaded = self.place.builder.plugins.loaded
        resumed = self.ledger.open(
            self.config.name,
            {
                "description": self.config.description,
                **study_facts(self.ledger.objectives, self.place.metrics),
                "config": self.config.to_dict(),
                "fingerprint": self.space.fingerprint,
                "identity": facts,
                "plugins": {name: plugin.to_dict() for name, plugin in loaded.items()},
            },
        )
        goal = self.config.budget.trials
        self.reporter.started(Study(self.ledger.folder), resumed, self.ledger.judged, goal)

    def run(self, executor: Executor) -> None:
        """Judge trials until the budget is reached or the space holds nothing new."""
        started, limit = time.monotonic(), self.config.budget.seconds
        while self.ledger.judged < self.config.budget.trials:
            if limit is not None and time.monotonic() - started >= limit:
                break
            if self.ledger.stale >= MAX_STALE:
                self.ledger.stale = 0  # a later run tries again
                raise WorkbenchError(self._exhausted())
            self._one(executor)

    def _exhausted(self) -> str:
        text = (
            f"the last {MAX_STALE} suggestions held no new feasible layout: the space is "
            "exhausted, or its constraints are too tight. What was found is recorded."
        )
        if self.refusals:
            reason, count = self.refusals.most_common(1)[0]
            text += f" The commonest refusal ({count} times): {reason}."
        return text

    def _one(self, executor: Executor) -> None:
        """One suggestion, from asking to telling; a fault of the machine ends the run after it."""
        sampler, seed = self.config.sampler, self.config.seed
        trial = storage.ask(self.ledger.optuna, sampler, seed, self.ledger.stale)
        record = self.ledger.start(trial, seed=seed, plugins=self.plugins)
        clock = time.monotonic()
        stop: BaseException | None = None
        try:
            verdict = self._judge(executor, trial, record)
        except KeyboardInterrupt as error:
            verdict, stop = Verdict(outcome="interrupted", reason="stopped by the user"), error
        except WorkbenchError as error:
            verdict, stop = Verdict(outcome="interrupted", reason=str(error)), error
        record["seconds"] = round(time.monotonic() - clock, 3)
        done = self.ledger.finish(record, verdict)
        if done.outcome == "infeasible":
            self.refusals[done.reason] += 1
        self.reporter.trial_finished(done)
        if stop is not None:
            raise stop
        if done.outcome == "interrupted":
            raise WorkbenchError(f"{done.reason}. Mend that and run the study again.")

    def _judge(self, executor: Executor, trial: optuna.Trial, record: dict[str, Any]) -> Verdict:
        folder = self.ledger.path(trial.number)
        layout, verdict = self._suggest(trial, record)
        if layout is None:
            return verdict
        known = self.ledger.duplicate(record)
        if known is not None:
            return known
        verdict.update(judge_static(self.place, layout, folder))
        if verdict.outcome != "complete":
            return verdict
        self.ledger.take_checkpoint(record)
        self.ledger.write(record)
        self.reporter.trial_started(trial.number, record["pattern"])

        def emit(event: dict[str, Any]) -> None:
            self.reporter.trial_progress(trial.number, event["progress"], event["loss"])

        verdict.update(executor.judge(layout, folder, emit))
        return verdict

    def _suggest(
        self, trial: optuna.Trial, record: dict[str, Any]
    ) -> tuple[Layout | None, Verdict]:
        folder = self.ledger.path(trial.number)
        try:
            layout = self.space.suggest(trial)
        except (StorageInternalError, SQLAlchemyError):
            raise
        except Exception as error:  # a policy or layer of a plugin may raise anything
            verdict = verdict_of(error, folder)
            if verdict.outcome == "infeasible":
                verdict.constraints[UNBUILDABLE] = 1.0
            return None, verdict
        finally:
            record["params"] = dict(trial.params)
        record["pattern"] = self.place.builder.pattern(layout)
        record["layout_hash"] = layout.hash
        write_json(folder / "layout.json", layout.to_dict())
        return layout, Verdict()
