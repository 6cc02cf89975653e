"""The books of a study: a record a trial, written before Optuna is told, and their sums."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from workbench import storage
from workbench.errors import WorkbenchError
from workbench.files import read_json, write_json
from workbench.records import Objective, Study, Trial
from workbench.verdict import Verdict

JUDGED = ("complete", "diverged", "out_of_memory", "timeout", "crashed", "error")
FAULTS = ("crashed", "interrupted")  # not the layout's doing: runs again
UNBUILDABLE = "buildable"  # the constraint that an impossible combination violates


class Ledger:
    """Records and storage of one study, kept in step. Only one process may hold one.

    Attributes:
        judged: trials that count towards the budget.
        known: layout hash → number of the trial that judged it.
        stale: how many of the last suggestions held nothing new.
    """

    def __init__(self, folder: Path, objectives: tuple[Objective, ...], retries: int) -> None:
        self.folder = folder
        self.objectives = objectives
        self.retries = retries
        self.judged = 0
        self.known: dict[str, int] = {}
        self.stale = 0

    def open(self, name: str, facts: dict[str, Any]) -> bool:
        """Open or make the study; end what an earlier run left unfinished. True if it was there.

        Raises:
            WorkbenchError: the storage cannot be opened, or is not the one of these records.
        """
        resumed = (self.folder / "study.json").exists()
        self.optuna = storage.open_storage(self.folder, name, self.objectives)
        self._refuse_strange_storage()
        write_json(self.folder / "study.json", {"name": name, **facts})
        self._reconcile()
        for trial in Study(self.folder).trials():
            self._count(trial)
        return resumed

    def start(self, trial: optuna.Trial, **facts: Any) -> dict[str, Any]:
        """Write the first record of a trial and return it."""
        record = {
            "number": trial.number,
            "outcome": "running",
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
        """Move the checkpoint of the trial that this one repeats into its own folder."""
        if record["retry_of"] is not None:
            checkpoint = self.path(record["retry_of"]) / "checkpoint.safetensors"
            if checkpoint.exists():
                checkpoint.rename(self.path(record["number"]) / checkpoint.name)

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
        frozen = self.optuna.get_trials(deepcopy=False)[record["number"]]
        self._settle(frozen, record)
        done = Study(self.folder).trial(record["number"])
        self._count(done)
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
        if again and record["outcome"] in FAULTS:
            attempt = record.get("attempt", 0) + (outcome == "crashed")
            # Suggestions that were cut short are drawn afresh, as they would have been.
            params = frozen.params if "layout_hash" in record else {}
            storage.enqueue_retry(self.optuna, frozen, params, attempt)
        elif record["outcome"] not in FAULTS:
            self._sweep(record["number"])
        state = TrialState.PRUNED if outcome == "infeasible" else TrialState.FAIL
        if record.get("values") is not None:
            state = TrialState.COMPLETE
        constraints = record.get("constraints", {})
        storage.tell(self.optuna, frozen, state, record.get("values"), constraints)

    def _sweep(self, number: int) -> None:
        """Remove what only a trial that runs again would need."""
        for path in self.path(number).iterdir():
            if path.name == "checkpoint.safetensors" or path.suffix == ".tmp":
                path.unlink()

    def _count(self, trial: Trial) -> None:
        trained = "training" in trial.data.get("stage_seconds", {})
        reached_worker = trained or "measured" in trial.data.get("stage_seconds", {})
        final = trial.outcome in JUDGED and trial.data.get("given_up", True)
        if final or (trial.outcome == "infeasible" and trained):
            self.judged += 1
            self.stale = 0
        elif trial.outcome in ("infeasible", "duplicate"):
            self.stale += 1
        if "layout_hash" in trial.data and (
            final or (trial.outcome == "infeasible" and reached_worker)
        ):
            self.known.setdefault(trial.data["layout_hash"], trial.number)

    def _refuse_strange_storage(self) -> None:
        known = len(self.optuna.get_trials(deepcopy=False))
        strangers = [t.number for t in Study(self.folder).trials()] if self._has_records() else []
        if strangers and max(strangers) >= known:
            raise WorkbenchError(
                f"{self.folder} has records of trials up to {max(strangers)}, and its optuna.db "
                f"knows {known}: the storage was lost or replaced. Put it back, or move the folder "
                "away to start anew."
            )

    def _has_records(self) -> bool:
        return (self.folder / "study.json").exists()

    def _reconcile(self) -> None:
        """End trials that a dead run left running: they are recorded, and run again."""
        for frozen in storage.unfinished(self.optuna):
            path = self.path(frozen.number) / "trial.json"
            record = read_json(path) if path.exists() else {"number": frozen.number}
            if record.get("outcome") in (None, "running"):
                record.update(
                    outcome="interrupted",
                    reason="its study's process ended",
                    params=frozen.params,
                    retry_of=frozen.user_attrs.get(storage.RETRY_OF),
                    attempt=frozen.user_attrs.get(storage.ATTEMPT, 0),
                )
                self.write(record)
            self._settle(frozen, record)


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
