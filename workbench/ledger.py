"""The books of a study: a record a trial, written before Optuna is told, and their sums."""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url

from workbench import storage
from workbench.claims import FOLDER as CLAIMS
from workbench.claims import Claims
from workbench.errors import WorkbenchError
from workbench.files import known_json, write_json
from workbench.parents import Parent
from workbench.records import Objective, Study, Trial
from workbench.storage_patience import PARENT
from workbench.storage_url import Store, default_url, redacted
from workbench.verdict import Verdict

JUDGED = ("complete", "stopped", "diverged", "out_of_memory", "timeout", "crashed", "error")
FAULTS = ("crashed", "interrupted")  # not the layout's doing: runs again
UNSETTLED = ("running", "paused")  # some process is at it, or was
CHECKPOINT = "checkpoint.safetensors"
UNBUILDABLE = "buildable"  # the constraint that an impossible combination violates


def _silent(message: str) -> None:
    """Tells nobody."""


class Ledger:
    """Records and storage of one study, kept in step. Every parent of the study holds one.

    Args:
        folder: the study's.
        parent: of this process (`parents.joined`).
        store: where Optuna's storage is.
        notice: is told of the study as a whole, such as that its storage is away.

    Attributes:
        judged: trials that count towards the budget, whoever ran them.
        known: layout hash → number of the trial that judged it.
        stale: how many of the last suggestions held nothing new.
        elsewhere: numbers of the trials that other parents have in flight.
        claims: on layouts.
    """

    def __init__(
        self,
        folder: Path,
        objectives: tuple[Objective, ...],
        retries: int,
        *,
        parent: Parent,
        store: Store = storage.DEFAULT,
        notice: Callable[[str], None] = _silent,
    ) -> None:
        self.folder = folder
        self.objectives = objectives
        self.retries = retries
        self.parent = parent
        self.store = store
        self.notice = notice
        self.judged = 0
        self.known: dict[str, int] = {}
        self.stale = 0
        self.elsewhere: set[int] = set()
        self.claims = Claims(folder, parent, self._holds)
        self._begun: dict[int, optuna.Trial] = {}  # by this process, and not finished
        self._settled: set[int] = set()
        self._seen: dict[int, tuple[int, int]] = {}  # unsettled records: time and size as read

    def open(self, name: str, facts: dict[str, Any]) -> bool:
        """Open or make the study; end what dead parents left unfinished. True if it was there.

        Raises:
            WorkbenchError: the storage cannot be opened, or is not the one of these records.
        """
        with self.parent.exclusive():
            before = self._before()
            self._refuse_other_store(before)
            backend = storage.connect(self.store, self.folder, self.parent, self.notice)
            identity = self._identity(before, storage.find_study(backend, name), name)
            place = {"storage": self.store.shown, "storage_id": identity}
            write_json(self.folder / "study.json", {"name": name, **place, **facts})
            self.optuna = storage.open_study(backend, name, self.objectives, identity)
            self.reconcile()
        self.refresh()
        return bool(before)

    def refresh(self) -> None:
        """Count what other parents recorded since; take over what dead ones left."""
        if self.parent.dead():
            self.reconcile()
        folder = self.folder / "trials"
        names = os.listdir(folder) if folder.exists() else ()
        for number in sorted(int(name) for name in names if name.isdigit()):
            if number not in self._settled and number not in self.parent.in_flight:
                self._look_at(number)

    def _look_at(self, number: int) -> None:
        try:
            status = (self.path(number) / "trial.json").stat()
        except FileNotFoundError:
            return  # its folder is made before its record
        stamp = (status.st_mtime_ns, status.st_size)
        if self._seen.get(number) == stamp:
            return
        trial = self._read(number)
        if trial.outcome in UNSETTLED:
            self.elsewhere.add(number)
        if trial.outcome in (*UNSETTLED, "damaged"):
            self._seen[number] = stamp
        else:
            self._settle_count(trial)

    def _settle_count(self, trial: Trial) -> None:
        self._seen.pop(trial.number, None)
        self.elsewhere.discard(trial.number)
        self._settled.add(trial.number)
        self._count(trial)

    def start(self, trial: optuna.Trial, **facts: Any) -> dict[str, Any]:
        """Write the first record of a trial and return it."""
        self.parent.in_flight.add(trial.number)
        self.parent.asking = False
        self._begun[trial.number] = trial
        record = {
            "number": trial.number,
            "outcome": "running",
            "parent": self.parent.id,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "retry_of": trial.user_attrs.get(storage.RETRY_OF),
            "attempt": trial.user_attrs.get(storage.ATTEMPT, 0),
            **facts,
        }
        self.write(record)
        return record

    def duplicate(self, record: dict[str, Any]) -> Verdict | None:
        """The verdict on a layout that was judged before; None for a new one."""
        number = self.known.get(record["layout_hash"])
        if number is None:
            return None
        original = Study(self.folder).trial(number)
        record["duplicate_of"] = number
        record["duplicate_outcome"] = original.outcome
        return Verdict(
            outcome="duplicate",
            reason=f"the same layout as trial {number} ({original.outcome})",
            metrics=original.metrics,
            constraints=dict(original.data["constraints"]),
        )

    def take_checkpoint(self, record: dict[str, Any]) -> None:
        """Move the checkpoint of the trials that this one repeats into its own folder."""
        for before in self.attempts(record):
            checkpoint = self.path(before["number"]) / CHECKPOINT
            if checkpoint.exists():
                checkpoint.rename(self.path(record["number"]) / CHECKPOINT)
                return

    def attempts(self, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The records of the trials that this one repeats, the last one first.

        The last may have ended before it took over what the one before it left.
        """
        number = record.get("retry_of")
        while number is not None:
            before = self._read(number).data
            yield before
            number = before.get("retry_of")

    def finish(self, record: dict[str, Any], verdict: Verdict) -> Trial:
        """Record first, tell after: what Optuna knows, the records know."""
        record.update(verdict.to_dict())
        record["environment"] = record["details"].pop("environment", {})
        if verdict.outcome == "crashed":
            record["given_up"] = record["attempt"] + 1 > self.retries
        has_values = all(objective.name in verdict.metrics for objective in self.objectives)
        settled = verdict.outcome == "complete" or record.get("duplicate_outcome") == "complete"
        record["values"] = (
            [verdict.metrics[objective.name] for objective in self.objectives]
            if settled and has_values
            else None
        )
        self.write(record)
        # What it was asked for and drew since is known here: reading it again takes longer.
        self._settle(self._begun[record["number"]]._cached_frozen_trial, record)
        del self._begun[record["number"]]
        done = Study(self.folder).trial(record["number"])
        self.parent.in_flight.discard(done.number)
        self._settle_count(done)
        return done

    def path(self, number: int) -> Path:
        """A trial's folder."""
        return self.folder / "trials" / f"{number:05d}"

    def write(self, record: dict[str, Any]) -> None:
        """Write a record, whole or not at all."""
        write_json(self.path(record["number"]) / "trial.json", record)

    def _settle(self, frozen: FrozenTrial, record: dict[str, Any]) -> None:
        """Tell Optuna what a final record says; queue the trial again if a fault ended it."""
        outcome = record.get("duplicate_outcome") or record["outcome"]
        again = outcome == "interrupted" or (outcome == "crashed" and not record.get("given_up"))
        again = again and record["outcome"] in FAULTS
        if again:
            attempt = record.get("attempt", 0) + (outcome == "crashed")
            # Suggestions that were cut short are drawn afresh, as they would have been; those
            # that repeat a trial have its parameters from the first.
            queued = frozen.system_attrs.get("fixed_params", {})
            params = frozen.params if "layout_hash" in record else queued
            storage.enqueue_retry(self.optuna, frozen, params, attempt)
        self._sweep(record, is_over=not again)
        state = state_of(record)
        constraints = record.get("constraints", {})
        storage.tell(self.optuna, frozen, state, record.get("values"), constraints)

    def _sweep(self, record: dict[str, Any], *, is_over: bool) -> None:
        """Remove what a killed process was writing and, of a trial that is over, checkpoints."""
        for path in self.path(record["number"]).glob(".*.tmp"):
            path.unlink(missing_ok=True)
        for attempt in (record, *self.attempts(record)) if is_over else ():
            (self.path(attempt["number"]) / CHECKPOINT).unlink(missing_ok=True)

    def _count(self, trial: Trial) -> None:
        if is_judged(trial):
            self.judged += 1
            self.stale = 0
        elif trial.outcome in ("infeasible", "duplicate"):
            self.stale += 1
        if "layout_hash" in trial.data and settles_layout(trial):
            self.known.setdefault(trial.data["layout_hash"], trial.number)

    def _holds(self, number: int) -> bool:
        """Whether a trial that claimed a layout is at it still, or has judged it."""
        if number in self.parent.in_flight:
            return True
        trial = self._read(number)
        if trial.outcome in UNSETTLED:
            owner = trial.data.get("parent")
            return owner not in (None, self.parent.id) and self.parent.alive(owner)
        return settles_layout(trial)

    def _read(self, number: int) -> Trial:
        """A trial's record as it stands; one that cannot be read counts for nothing."""
        name, path = self.folder.name, self.path(number)
        try:
            trial = Trial(name, path)
        except WorkbenchError as error:
            return Trial.damaged(name, path, str(error))
        lacking = [o.name for o in self.objectives if o.name not in trial.metrics]
        if trial.outcome == "complete" and lacking:
            return Trial.damaged(name, path, f"it lacks {', '.join(lacking)}")
        return trial

    def _before(self) -> dict[str, Any]:
        """What `study.json` says; nothing if this study is new."""
        path = self.folder / "study.json"
        return Study(self.folder).data if path.exists() else {}

    def _refuse_other_store(self, before: dict[str, Any]) -> None:
        then, now = before.get("storage"), self.store.shown
        if not before or self._same_place(then, now):
            return
        advice = (
            "Its default is wanted: leave --storage, WORKBENCH_STORAGE and runtime.storage away."
            if then is None
            else f"Give it again (with its password): --storage or WORKBENCH_STORAGE, {then}."
        )
        raise WorkbenchError(
            f"the study in {self.folder} keeps its trials in {then or 'its own optuna.db'}, not in "
            f"{now or 'its own optuna.db'}. {advice}"
        )

    def _same_place(self, then: str | None, now: str | None) -> bool:
        """Passwords and users may change, and a file's folder may be named."""
        own = redacted(default_url(self.folder.resolve()))
        return _place(then or own) == _place(now or own)

    def _identity(self, before: dict[str, Any], found: optuna.Study | None, name: str) -> str:
        """What ties these records to the study in the storage.

        Raises:
            WorkbenchError: the storage has another study of this name, or lost this one's trials.
        """
        # Records before the storage: another process may be adding a trial.
        strangers = [int(path.name) for path in (self.folder / "trials").glob("[0-9]*")]
        there = None if found is None else found.user_attrs.get(storage.IDENTITY)
        here = before.get("storage_id")
        known = 0 if found is None else len(found.get_trials(deepcopy=False))
        # Its own file is ours whatever it lacks; elsewhere only what a killed process just began.
        ours = None in (here, there) if self.store.url is None else there is None and not known
        if found is not None and there != here and not ours:
            raise WorkbenchError(
                f"the storage {self.store.shown or self.folder / 'optuna.db'} holds another study "
                f"{name!r}, whose records are not in {self.folder}: give the study another name, "
                "or --runs the folder that it was started in."
            )
        if before and strangers and max(strangers) >= known:
            raise WorkbenchError(
                f"{self.folder} has records of trials up to {max(strangers)}, and its storage "
                f"knows {known}: the storage was lost or replaced. Put it back, or move the folder "
                "away to start anew."
            )
        return str(there or here or secrets.token_hex(8))

    def reconcile(self) -> None:
        """End trials whose parent is gone: they are recorded, and run again."""
        with self.parent.exclusive():
            dead = self.parent.dead()
            for frozen in storage.unfinished(self.optuna):
                owner = frozen.user_attrs.get(PARENT)
                mine = owner == self.parent.id and frozen.number in self.parent.in_flight
                theirs = owner not in (None, self.parent.id) and self.parent.alive(owner)
                if not mine and not theirs:
                    self._end(frozen)
            if dead:
                self._clear_away()
            self.parent.forget(dead)

    def _clear_away(self) -> None:
        """Remove what dead parents were writing; living ones write these in their turn only."""
        for pattern in (".study.json.*.tmp", f"{CLAIMS}/.*.tmp"):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)

    def _end(self, frozen: FrozenTrial) -> None:
        """End a trial that nobody is at any more."""
        path = self.path(frozen.number) / "trial.json"
        record = known_json(path) or {"number": frozen.number}
        if record.get("outcome") in (None, *UNSETTLED):
            record.update(
                outcome="interrupted",
                reason="its study's process ended",
                params=frozen.params,
                retry_of=frozen.user_attrs.get(storage.RETRY_OF),
                attempt=frozen.user_attrs.get(storage.ATTEMPT, 0),
            )
            self.write(record)
        self._settle(frozen, record)


def state_of(record: dict[str, Any]) -> TrialState:
    """What Optuna is told of a final record.

    Of a trial that was stopped at a rung no values: those of a rung would break TPE.
    """
    if record.get("values") is not None:
        return TrialState.COMPLETE
    outcome = record.get("duplicate_outcome") or record["outcome"]
    return TrialState.PRUNED if outcome in ("infeasible", "stopped") else TrialState.FAIL


def is_judged(trial: Trial) -> bool:
    """Whether a trial counts towards the budget."""
    trained = "training" in trial.data.get("stage_seconds", {})
    return _is_final(trial) or (trial.outcome == "infeasible" and trained)


def settles_layout(trial: Trial) -> bool:
    """Whether nobody need judge a trial's layout again."""
    reached = {"training", "measured", "synthetic"} & set(trial.data.get("stage_seconds", {}))
    return _is_final(trial) or (trial.outcome == "infeasible" and bool(reached))


def _is_final(trial: Trial) -> bool:
    return trial.outcome in JUDGED and bool(trial.data.get("given_up", True))


def _place(shown: str) -> tuple[Any, ...]:
    parsed = make_url(shown)
    return parsed.get_backend_name(), parsed.host, parsed.port, parsed.database, parsed.query


def objectives_of(metrics: dict[str, Any], names: tuple[str, ...]) -> tuple[Objective, ...]:
    """The objectives with the unit and direction that their metrics declare."""
    return tuple(
        Objective(name=name, unit=metrics[name].unit, direction=metrics[name].direction)
        for name in names
    )


def study_facts(objectives: tuple[Objective, ...], metrics: dict[str, Any]) -> dict[str, Any]:
    """What `study.json` says of objectives, units and stages."""
    return {
        "objectives": [dataclasses.asdict(objective) for objective in objectives],
        "units": {name: metric.unit for name, metric in metrics.items()},
        "stages": {name: metric.stage for name, metric in metrics.items()},
    }
