"""Runs a study: create or resume, ask, judge, record, tell. This process is the only writer."""

from __future__ import annotations

import contextlib
import fcntl
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import SQLAlchemyError

from workbench import storage
from workbench.builder import Builder, default_builder
from workbench.environment import resolve_device
from workbench.errors import DiskError, FieldError, UnknownNameError, WorkbenchError
from workbench.executors import Executor, InlineExecutor, Job, ProcessExecutor
from workbench.files import make_folder, write_json
from workbench.guard import guarded
from workbench.identity import identity, refuse_change, trial_provenance, used_plugins
from workbench.layout import Layout
from workbench.ledger import JUDGED, UNBUILDABLE, Ledger, objectives_of, study_facts
from workbench.records import Study, Trial, runs_folder
from workbench.refusals import Refusals
from workbench.space import Space, require
from workbench.study_config import StudyConfig
from workbench.trial import Emit, Workplace, judge_static
from workbench.verdict import Verdict, verdict_of

__all__ = ["JUDGED", "Reporter", "run_study"]

MAX_STALE = 100  # suggestions in a row without a new layout before the space counts as exhausted
HOPELESS = 40  # the same where none was ever feasible: a mistake in the file, most likely


class Reporter:
    """What a study says while it runs; the command line draws it. Override what you need."""

    def started(self, study: Study, resumed: bool, judged: int, goal: int) -> None:
        """The study is open; `judged` of `goal` trials are done already."""

    def trial_started(self, number: int, pattern: str) -> None:
        """A trial passed the static stage and goes to the executor."""

    def trial_phase(self, number: int, phase: str) -> None:
        """A trial goes on to `phase`, one of `workbench.trial.PHASES`; one may come again."""

    def trial_progress(self, number: int, step: int, steps: int, loss: float) -> None:
        """Training has done `step` of `steps`, at a loss in nats a token."""

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
    try:
        device = resolve_device(config.runtime.device)
    except FieldError as error:
        raise error.within("runtime") from None
    folder = runs_folder(runs) / config.name
    cache_dir = runs_folder(runs) / ".cache"
    try:
        _check_names(config, builder)
        place = Workplace(config, builder, device, cache_dir)
        space = Space(config.space, builder, place.data.vocab_size)
    except UnknownNameError as error:
        hint = " ".join(filter(None, (error.hint, _forgotten_folders(folder, config))))
        raise UnknownNameError(error.kind, error.name, error.known, hint) from None
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


def _check_names(config: StudyConfig, builder: Builder) -> None:
    """Refuse metrics and data sources that do not exist, naming the field that asks for them."""
    for registry, field, names in (
        (builder.metrics, "objectives", config.objectives),
        (builder.metrics, "report", config.report),
        (builder.metrics, "constraints", tuple(config.constraints)),
        (builder.data_sources, "data.source", (config.data["source"],)),
    ):
        for name in names:
            require(registry, name, field)


def _forgotten_folders(folder: Path, config: StudyConfig) -> str:
    """Which plugin folders the study was made with and now is without; empty for none."""
    if not (folder / "study.json").exists():
        return ""
    before = Study(folder).data["config"].get("plugin_dirs", ())
    missing = [name for name in before if name not in config.plugin_dirs]
    if not missing:
        return ""
    options = " ".join(f"--plugin-dir {shlex.quote(name)}" for name in missing)
    return f"The study was made with the plugins of {', '.join(missing)}: add {options}."


def _executor(place: Workplace, cache_dir: Path) -> Executor:
    if place.config.runtime.executor == "inline":
        return InlineExecutor(place)
    plugins = used_plugins(place.config, place.builder)
    return ProcessExecutor(
        Job(config=place.config, device=place.device, cache_dir=cache_dir, plugins=plugins)
    )


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
        self.refusals = Refusals()
        self.hopeless = True  # no suggestion was ever feasible

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
        study = Study(self.ledger.folder)
        self.hopeless = all(trial.outcome == "infeasible" for trial in study.trials())
        self.reporter.started(study, resumed, self.ledger.judged, goal)

    def run(self, executor: Executor) -> None:
        """Judge trials until the budget is reached or the space holds nothing new."""
        started, limit = time.monotonic(), self.config.budget.seconds
        earlier = self.ledger.stale  # suggestions of earlier runs: this one tries afresh
        while self.ledger.judged < self.config.budget.trials:
            if limit is not None and time.monotonic() - started >= limit:
                break
            earlier = min(earlier, self.ledger.stale)
            self._refuse_to_go_on(self.ledger.stale - earlier)
            self._one(executor)

    def _refuse_to_go_on(self, stale: int) -> None:
        """Stop where suggesting more would hardly find anything new.

        Args:
            stale: how many of the last suggestions of this run held nothing new.

        Raises:
            WorkbenchError: says what refused the suggestions, and what to change.
        """
        name = self.config.name
        lines = self.refusals.lines(self.config.space)
        if self.hopeless and stale >= min(HOPELESS, MAX_STALE):
            text = f"none of {stale} suggestions is feasible. What refused them:"
            advice = (
                "Change that in the study's file and give the study another name; the same "
                f"command tries {stale} more."
            )
        elif stale >= MAX_STALE:
            text = (
                f"the last {stale} suggestions held no new feasible layout: the space is "
                "exhausted, or its constraints are too tight."
                + (" What refused suggestions:" if lines else "")
            )
            advice = "A study with more to choose from needs another name."
        else:
            return
        recorded = f"What was found is recorded: workbench show {name} --all."
        raise WorkbenchError("\n".join([text, *lines, f"{advice} {recorded}"]))

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
        if verdict.outcome == "infeasible" and max(verdict.constraints.values(), default=0.0) <= 0:
            verdict.constraints[UNBUILDABLE] = 1.0
        record["seconds"] = round(time.monotonic() - clock, 3)
        done = self.ledger.finish(record, verdict)
        if done.outcome == "infeasible":
            self.refusals.add(done)
        else:
            self.hopeless = False
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
        verdict.update(executor.judge(layout, folder, self._told(trial.number, record["pattern"])))
        return verdict

    def _told(self, number: int, pattern: str) -> Emit:
        """Tells the reporter of a trial's phases; returns what takes the worker's messages."""
        steps = self.place.training.steps
        self.reporter.trial_started(number, pattern)

        def emit(event: dict[str, Any]) -> None:
            if "phase" in event:
                self.reporter.trial_phase(number, event["phase"])
            else:
                step = round(event["progress"] * steps)
                self.reporter.trial_progress(number, step, steps, event["loss"])

        return emit

    def _suggest(
        self, trial: optuna.Trial, record: dict[str, Any]
    ) -> tuple[Layout | None, Verdict]:
        folder = self.ledger.path(trial.number)
        try:
            with guarded("a placement policy or layer", self.place.builder.plugins.packages):
                layout = self.space.suggest(trial)
        except (StorageInternalError, SQLAlchemyError, KeyboardInterrupt):
            raise
        except BaseException as error:  # a policy or layer of a plugin may raise anything
            return None, verdict_of(error, folder)
        finally:
            record["params"] = dict(trial.params)
        record["pattern"] = self.place.builder.pattern(layout)
        record["layout_hash"] = layout.hash
        placement = trial.params.get("placement", self.config.space.placements[0])
        record["provenance"] = trial_provenance(self.config, self.place.builder, layout, placement)
        write_json(folder / "layout.json", layout.to_dict())
        return layout, Verdict()
