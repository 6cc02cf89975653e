"""Runs a study: create or resume, ask, judge, record, tell. This process is the only writer."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from workbench import storage
from workbench.builder import Builder, default_builder
from workbench.environment import device_name, resolve_device
from workbench.errors import WorkbenchError
from workbench.executors import Executor, InlineExecutor, Job, ProcessExecutor
from workbench.files import make_folder, read_json, write_json
from workbench.layout import Layout
from workbench.records import Objective, Study, Trial, runs_folder
from workbench.space import Space
from workbench.study_config import StudyConfig
from workbench.trial import Verdict, Workplace, classify, judge_static

JUDGED = ("complete", "diverged", "out_of_memory", "timeout", "crashed", "error")
FAULTS = ("crashed", "interrupted")  # not the layout's doing: runs again
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
    identity = _identity(place, space)
    _refuse_change(folder, identity, config.name)
    with _locked(folder), storage.reporting_failures(folder):
        runner = _Runner(place, space, folder, reporter or Reporter())
        runner.open(identity)
        with contextlib.closing(_executor(place, cache_dir)) as executor:
            runner.run(executor)
    return Study(folder)


def _executor(place: Workplace, cache_dir: Path) -> Executor:
    if place.config.runtime.executor == "inline":
        return InlineExecutor(place)
    return ProcessExecutor(Job(config=place.config, device=place.device, cache_dir=cache_dir))


def _identity(place: Workplace, space: Space) -> dict[str, Any]:
    """What must not change while a study goes on, or its figures would not compare."""
    config = place.config.to_dict()
    measured = any(metric.stage == "measured" for metric in place.metrics.values())
    return {
        "space": space.to_dict(),
        **{name: config[name] for name in ("objectives", "constraints", "metrics", "data", "seed")},
        "training": dataclasses.asdict(place.training),
        "data_facts": place.data.describe(),
        "device": device_name(place.device) if measured else place.device,
    }


def _refuse_change(folder: Path, identity: dict[str, Any], name: str) -> None:
    if not (folder / "study.json").exists():
        return
    before = Study(folder).data.get("identity", {})
    changes = list(_differences(before, identity))
    if changes:
        shown = "\n".join(f"  {change}" for change in changes[:8])
        raise WorkbenchError(
            f"study {name!r} in {folder} was started differently:\n{shown}\n"
            "Its trials would not compare with new ones. Give the study another name to start a "
            "new one, or put the old values back to resume."
        )


def _differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            inner = f"{where}.{key}" if where else str(key)
            yield from _differences(before.get(key), now.get(key), inner)
    elif _plain(before) != _plain(now):
        yield f"{where}: {before!r} then, {now!r} now"


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the study's folder; the lock goes with the process, however it ends."""
    make_folder(folder)
    with (folder / "lock").open("a") as lock:
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
        self.folder = folder
        self.reporter = reporter
        self.objectives = tuple(
            Objective(name=name, unit=metric.unit, direction=metric.direction)
            for name in self.config.objectives
            for metric in (place.metrics[name],)
        )
        self.known: dict[str, int] = {}  # layout hash → number of the trial that was judged
        self.judged = 0

    @property
    def builder(self) -> Builder:
        return self.place.builder

    def open(self, identity: dict[str, Any]) -> None:
        """Open storage and folder, and reconcile what an earlier run left behind."""
        resumed = (self.folder / "study.json").exists()
        self.storage = storage.open_storage(self.folder, self.config.name, self.objectives)
        write_json(
            self.folder / "study.json",
            {
                "name": self.config.name,
                "description": self.config.description,
                "objectives": [dataclasses.asdict(objective) for objective in self.objectives],
                "units": {name: metric.unit for name, metric in self.place.metrics.items()},
                "config": self.config.to_dict(),
                "fingerprint": self.space.fingerprint,
                "identity": identity,
                "plugins": {
                    name: plugin.to_dict() for name, plugin in self.builder.plugins.loaded.items()
                },
            },
        )
        self._reconcile()
        for trial in Study(self.folder).trials():
            self._count(trial)
        self.reporter.started(Study(self.folder), resumed, self.judged, self.config.budget.trials)

    def run(self, executor: Executor) -> None:
        """Judge trials until the budget is reached or the space holds nothing new."""
        started, stale = time.monotonic(), 0
        limit = self.config.budget.seconds
        while self.judged < self.config.budget.trials:
            if limit is not None and time.monotonic() - started >= limit:
                break
            before = self.judged
            self._one(executor, stale)
            stale = 0 if self.judged > before else stale + 1
            if stale >= MAX_STALE:
                raise WorkbenchError(
                    f"the last {MAX_STALE} suggestions held no new feasible layout: the space "
                    "is exhausted or its constraints are too tight. What was found is recorded."
                )

    def _one(self, executor: Executor, stale: int) -> None:
        trial = storage.ask(self.storage, self.config.sampler, self.config.seed, stale)
        record = self._new_record(trial)
        verdict, layout = self._static(trial, record)
        try:
            if layout is not None and verdict.outcome == "complete":
                if layout.hash in self.known:
                    verdict = self._duplicate(self.known[layout.hash], record)
                else:
                    verdict.update(self._judge(executor, trial, layout, record))
        except KeyboardInterrupt:
            verdict.outcome, verdict.reason = "interrupted", "stopped by the user"
            self._finish(trial, record, verdict)
            raise
        self._finish(trial, record, verdict)
        if verdict.outcome == "interrupted":
            raise WorkbenchError(f"{verdict.reason}. Make room and run the study again.")

    def _new_record(self, trial: optuna.Trial) -> dict[str, Any]:
        record = {
            "number": trial.number,
            "outcome": "running",
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": self.config.seed,
            "retry_of": trial.user_attrs.get(storage.RETRY_OF),
        }
        self._write(record)
        return record

    def _static(self, trial: optuna.Trial, record: dict[str, Any]) -> tuple[Verdict, Layout | None]:
        record["clock"] = time.monotonic()
        try:
            layout = self.space.suggest(trial)
        except (StorageInternalError, SQLAlchemyError):
            raise
        except Exception as error:  # a policy or layer of a plugin may raise anything
            outcome, reason = classify(error)
            return Verdict(outcome=outcome, reason=reason), None
        finally:
            record["params"] = dict(trial.params)
        record["pattern"] = self.builder.pattern(layout)
        record["layout_hash"] = layout.hash
        write_json(self._folder(trial.number) / "layout.json", layout.to_dict())
        return judge_static(self.place, layout), layout

    def _duplicate(self, original: int, record: dict[str, Any]) -> Verdict:
        known = Study(self.folder).trial(original)
        record["duplicate_of"] = original
        return Verdict(
            outcome="duplicate",
            reason=f"the same layout as trial {original} ({known.outcome})",
            metrics=known.metrics,
            constraints=dict(known.data["constraints"]),
        )

    def _judge(
        self, executor: Executor, trial: optuna.Trial, layout: Layout, record: dict[str, Any]
    ) -> Verdict:
        folder = self._folder(trial.number)
        self._take_checkpoint(record["retry_of"], folder)
        self._write(record)
        self.reporter.trial_started(trial.number, record["pattern"])

        def emit(event: dict[str, Any]) -> None:
            self.reporter.trial_progress(trial.number, event["progress"], event["loss"])

        return executor.judge(layout, folder, emit)

    def _take_checkpoint(self, retry_of: int | None, folder: Path) -> None:
        if retry_of is not None:
            checkpoint = self._folder(retry_of) / "checkpoint.safetensors"
            if checkpoint.exists():
                checkpoint.rename(folder / checkpoint.name)

    def _finish(self, trial: optuna.Trial, record: dict[str, Any], verdict: Verdict) -> None:
        """Record first, tell after: what Optuna knows, the records know."""
        record["seconds"] = round(time.monotonic() - record.pop("clock"), 3)
        record.update(verdict.to_dict())
        record["environment"] = record["details"].pop("environment", {})
        complete = verdict.outcome == "complete" or (
            verdict.outcome == "duplicate" and self._has_values(verdict)
        )
        values = [verdict.metrics[o.name] for o in self.objectives] if complete else None
        record["values"] = values
        self._write(record)
        if verdict.outcome in FAULTS:
            frozen = self.storage.get_trials(deepcopy=False)[trial.number]
            storage.enqueue_retry(self.storage, frozen, self.config.budget.retries)
        states = {"infeasible": TrialState.PRUNED}
        state = TrialState.COMPLETE if complete else states.get(verdict.outcome, TrialState.FAIL)
        storage.tell(self.storage, trial, state, values, verdict.constraints)
        done = Study(self.folder).trial(trial.number)
        self._count(done)
        self.reporter.trial_finished(done)

    def _has_values(self, verdict: Verdict) -> bool:
        return all(objective.name in verdict.metrics for objective in self.objectives)

    def _count(self, trial: Trial) -> None:
        if trial.outcome in JUDGED:
            self.judged += 1
        if trial.outcome in JUDGED and trial.outcome != "crashed" and "layout_hash" in trial.data:
            self.known.setdefault(trial.data["layout_hash"], trial.number)

    def _reconcile(self) -> None:
        """End trials that a dead run left running: they are recorded, and run again."""
        for frozen in storage.unfinished(self.storage):
            path = self._folder(frozen.number) / "trial.json"
            record = read_json(path) if path.exists() else {"number": frozen.number}
            if record.get("outcome") in (None, "running"):
                record.update(
                    outcome="interrupted", reason="its study's process ended", params=frozen.params
                )
                self._write(record)
            self._close_stale(frozen, record)

    def _close_stale(self, frozen: FrozenTrial, record: dict[str, Any]) -> None:
        """Tell Optuna how a trial ended that was recorded when the process died before telling."""
        values = record.get("values")
        if values is not None:
            self.storage.tell(frozen.number, values, TrialState.COMPLETE)
            return
        if record["outcome"] in FAULTS:
            storage.enqueue_retry(self.storage, frozen, self.config.budget.retries)
        self.storage.tell(frozen.number, None, TrialState.FAIL)

    def _folder(self, number: int) -> Path:
        return self.folder / "trials" / f"{number:05d}"

    def _write(self, record: dict[str, Any]) -> None:
        shown = {name: value for name, value in record.items() if name != "clock"}
        write_json(self._folder(record["number"]) / "trial.json", shown)
