"""What must hold of a study's books after whatever happened to it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial

from tests.workbench.faults.driver import Campaign
from tests.workbench.faults.schedule import AGAIN, OUTCOMES
from tests.workbench.faults.tickets import FOLDER
from workbench.ledger import is_judged, state_of
from workbench.records import Study, Trial

HARMLESS = frozenset({"complete", "stopped", "duplicate", "infeasible", "interrupted"})


@dataclasses.dataclass
class Accounts:
    """What is wrong with a study's books: all lists are empty where nothing is.

    Attributes:
        lost: trials that were suggested and are neither on record nor run again, or that the
            storage still takes for running.
        duplicated: numbers or layouts that are there twice.
        disagreeing: trials whose record and storage differ.
        unexplained: faults that did not strike, or whose trial ended as they do not explain.
        stray: files that nobody needs any more.
    """

    lost: list[str] = dataclasses.field(default_factory=list)
    duplicated: list[str] = dataclasses.field(default_factory=list)
    disagreeing: list[str] = dataclasses.field(default_factory=list)
    unexplained: list[str] = dataclasses.field(default_factory=list)
    stray: list[str] = dataclasses.field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        return [
            f"{name}: {item}" for name, items in dataclasses.asdict(self).items() for item in items
        ]


def account(campaign: Campaign) -> Accounts:
    """Compare records, storage and schedule."""
    records = {trial.number: trial for trial in Study(campaign.study).trials()}
    with told(campaign) as trials:
        accounts = Accounts()
        _compare(accounts, records, trials)
        _count(accounts, campaign.budget, records, trials)
        _explain(accounts, campaign, records)
    accounts.stray = [
        str(path.relative_to(campaign.study)) for path in sorted(_stray(campaign.study))
    ]
    return accounts


@contextlib.contextmanager
def told(campaign: Campaign) -> Iterator[list[FrozenTrial]]:
    """The trials as Optuna's storage has them."""
    url = campaign.url or f"sqlite:///{campaign.study / 'optuna.db'}"
    storage = RDBStorage(url.replace("{", "{{").replace("}", "}}"))
    try:
        study = optuna.load_study(study_name=campaign.study.name, storage=storage)
        yield study.get_trials()
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _compare(accounts: Accounts, records: dict[int, Trial], trials: list[FrozenTrial]) -> None:
    """Each suggested trial is on record, and ended there as in the storage."""
    for frozen in trials:
        record = records.get(frozen.number)
        if record is None or not frozen.state.is_finished():
            accounts.lost.append(f"trial {frozen.number}: {frozen.state.name}, {record}")
        elif (frozen.state, frozen.values, frozen.params) != (
            state_of(record.data),
            record.data.get("values"),
            record.params,
        ):
            accounts.disagreeing.append(f"trial {frozen.number}: {frozen}, {record.data}")
    unknown = records.keys() - {frozen.number for frozen in trials}
    accounts.disagreeing += [f"trial {number} is in no storage" for number in sorted(unknown)]


def _count(
    accounts: Accounts, budget: int, records: dict[int, Trial], trials: list[FrozenTrial]
) -> None:
    """The budget is reached, each layout is judged once, each interrupted trial runs again."""
    judged = [trial for trial in records.values() if is_judged(trial)]
    if len(judged) < budget:
        accounts.lost.append(f"{budget - len(judged)} trials of the budget")
    if len(judged) > budget:
        accounts.duplicated.append(f"{len(judged) - budget} trials past the budget")
    for hash_, count in Counter(trial.data["layout_hash"] for trial in judged).items():
        if count > 1:
            accounts.duplicated.append(f"layout {hash_} was judged {count} times")
    again: dict[int, list[Trial]] = {}
    for trial in records.values():
        if trial.data.get("retry_of") is not None:
            again.setdefault(trial.data["retry_of"], []).append(trial)
    for trial in records.values():
        runs = again.get(trial.number, [])
        unfinished = trial.outcome in AGAIN and not trial.data.get("given_up")
        if len(runs) != unfinished:
            wrong = accounts.lost if not runs else accounts.duplicated
            wrong.append(f"{trial} was run again {len(runs)} times")
        if runs and "layout_hash" in trial.data and runs[0].params != trial.params:
            accounts.disagreeing.append(f"{trial} was run again as {runs[0].params}")
    fresh = [t.user_attrs["suggestion"] for t in trials if "retry_of" not in t.user_attrs]
    if fresh != list(range(len(fresh))):
        accounts.duplicated.append(f"suggestions are numbered {fresh}")


def _explain(accounts: Accounts, campaign: Campaign, records: dict[int, Trial]) -> None:
    """Each fault struck once, and its trial says so; a fault beside it may have ended it too."""
    fired = {facts["number"]: facts for facts in campaign.fired}
    missing = [fault for fault in campaign.faults if fault.number not in fired]
    accounts.unexplained += [f"did not strike: {fault}" for fault in missing]
    planted: dict[int, set[str]] = {}
    for facts in fired.values():
        if facts["trial"]:
            outcome = OUTCOMES[facts["kind"]]
            kinds = {outcome, "stopped"} if outcome == "complete" else {outcome}
            planted.setdefault(int(Path(facts["trial"]).name), {"interrupted"}).update(kinds)
    for facts in fired.values():
        trial = records[int(Path(facts["trial"]).name)] if facts["trial"] else None
        if trial is not None and trial.outcome not in planted[trial.number]:
            accounts.unexplained.append(f"{facts} ended as {trial.outcome}: {trial.reason}")
    for trial in records.values():
        # A checkpoint that was damaged is found so by the trial that takes it over.
        before = planted.get(trial.data.get("retry_of") or -1, set())
        if trial.number not in planted and trial.outcome not in HARMLESS | before:
            accounts.unexplained.append(f"{trial} without a fault: {trial.reason}")


def _stray(study: Path) -> Iterator[Path]:
    kept = {trial.path for trial in Study(study).trials() if trial.outcome == "complete"}
    for path in study.rglob("*"):
        temporary = path.suffix == ".tmp" or path.name.endswith(("-journal", "-wal", "-shm"))
        left = path.name in ("checkpoint.safetensors", "ballast")
        parent = path.parent.name == "parents" and not path.name.startswith(".")
        if temporary or left or parent:
            yield path
    yield from (path for path in kept if not (path / "model.safetensors").exists())


def best_again(campaign: Campaign) -> tuple[float, float]:
    """The best trial's loss on record, and that of its stored weights, evaluated now."""
    trials = [trial for trial in Study(campaign.study).trials() if trial.outcome == "complete"]
    best = min(trials, key=lambda trial: trial.metrics["loss"])
    return best.metrics["loss"], _evaluated(campaign, best)


def _evaluated(campaign: Campaign, trial: Trial) -> float:
    import os
    import subprocess
    import sys

    from tests.workbench.faults.driver import ROOT

    environment = {**os.environ, FOLDER: os.devnull, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", EVALUATE, str(trial.path), str(campaign.study)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loss = float(json.loads(done.stdout.splitlines()[-1]))
    assert math.isfinite(loss)
    return loss


def survived(campaign: Campaign, accounts: Accounts) -> dict[str, tuple[int, int]]:
    """Faults of each kind that were planted, and how many of them struck and are explained."""
    fired: dict[str, Any] = {facts["number"]: facts for facts in campaign.fired}
    words = "\n".join(accounts.unexplained)
    table: dict[str, tuple[int, int]] = {}
    for fault in campaign.faults:
        planted, well = table.get(fault.kind, (0, 0))
        good = fault.number in fired and f"'number': {fault.number}," not in words
        table[fault.kind] = planted + 1, well + good
    return table


EVALUATE = """
import json, sys
from pathlib import Path
from workbench.builder import default_builder
from workbench.records import Study
from workbench.study_config import StudyConfig
from workbench.trial import Workplace, load_trained

folder, study = map(Path, sys.argv[1:])
config = StudyConfig.from_dict(Study(study).data["config"])
builder = default_builder(config.plugin_dirs)
place = Workplace(config, builder, "cpu", study.parent / ".cache")
trial = Study(study).trial(int(folder.name))
model = load_trained(builder, trial.layout, trial.weights)
print(json.dumps(place.metrics["loss"].measure(place.subject(trial.layout, model))))
"""
