"""Copies a study's finished trials into a new study whose space is larger.

A study's space cannot change, or its trials would not compare. A new study with more to choose from
(a new plugin's layer, say) may begin with what an old one found, as long as data, objectives and
training are the same: each trial is suggested again in the new space, and must make its layout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution

from workbench import storage
from workbench.builder import default_builder
from workbench.environment import resolve_device
from workbench.errors import FieldError, WorkbenchError
from workbench.files import new_folder, write_json
from workbench.identity import differences, identity
from workbench.ledger import Ledger, objectives_of, settles_layout, state_of
from workbench.parents import Parent, joined
from workbench.records import Study, Trial, load_study, runs_folder
from workbench.replay import replayed
from workbench.space import Space
from workbench.storage_url import Store, chosen
from workbench.study import study_record
from workbench.study_config import StudyConfig
from workbench.trial import Workplace

MAY_GROW = ("space", "plugins", "backends")
MIGRATED = "migrated_from"
UNFINISHED = "workbench:migrating"
LEFT_BEHIND = ("checkpoint.safetensors", "trial.json")


@dataclasses.dataclass(frozen=True)
class Migration:
    """What was copied.

    Attributes:
        study: the new one.
        numbers: old number → new number of every trial that was copied.
        left_out: how many finished trials were not, by reason.
    """

    study: Study
    numbers: dict[int, int]
    left_out: dict[str, int]


@dataclasses.dataclass
class _Copy:
    """A trial that fits the new space, with what it was suggested from there."""

    old: Trial
    params: dict[str, Any]
    distributions: dict[str, BaseDistribution]


def migrate(
    old: str, config: StudyConfig, runs: str | Path | None = None, storage_url: str | None = None
) -> Migration:
    """Make a new study out of a file, with the finished trials of an old one.

    Args:
        old: name of the old study.
        config: of the new one.
        storage_url: as for `run_study`.

    Raises:
        WorkbenchError: the new study is there already, differs in more than its space, or none of
            the trials fits it. Nothing is left behind then.
    """
    source, folder = load_study(old, runs), runs_folder(runs) / config.name
    if folder.exists():
        raise WorkbenchError(
            f"there is a study {config.name!r} in {folder} already: give the new one another name."
        )
    builder = default_builder(config.plugin_dirs)
    try:
        device = resolve_device(config.runtime.device)
    except FieldError as error:
        raise error.within("runtime") from None
    place = Workplace(config, builder, device, runs_folder(runs) / ".cache")
    space = Space(config.space, builder, place.data.vocab_size)
    place.probe()
    facts = identity(place, space)
    _refuse_incomparable(source, facts, config.name)
    copies, left_out = _fitting(source, space)
    store = chosen(storage_url, config.runtime.storage, config.runtime.storage_patience)
    record = {**study_record(place, space, facts), MIGRATED: source.name}
    objectives = objectives_of(place.metrics, config.objectives)
    with storage.reporting_failures(folder, store), new_folder(folder) as temporary:
        with joined(temporary) as parent:
            _clear(store, parent, config.name)
            ledger = Ledger(
                temporary, objectives, config.budget.retries, parent=parent, store=store
            )
            with _undone(ledger, store):
                ledger.open(config.name, record)
                ledger.optuna.set_user_attr(UNFINISHED, True)
                numbers = _copied(copies, ledger, source)
                ledger.optuna.set_user_attr(UNFINISHED, False)
        shutil.rmtree(temporary / "parents")
    return Migration(Study(folder), numbers, left_out)


def _refuse_incomparable(source: Study, now: dict[str, Any], name: str) -> None:
    """Refuse a new study whose figures would not compare with the old one's."""
    before = {"backends": {}, "rungs": now.get("rungs"), **source.data.get("identity", {})}
    differ = [
        change
        for field, value in now.items()
        if field not in MAY_GROW
        for change in differences(before.get(field), value, field)
    ]
    for field in ("plugins", "backends"):  # those that both use
        for key in before.get(field, {}).keys() & now[field].keys():
            differ += differences(before[field][key], now[field][key], f"{field}.{key}")
    if differ:
        shown = "\n".join(f"  {change}" for change in sorted(differ)[:8])
        raise WorkbenchError(
            f"study {source.name!r} cannot be migrated to {name!r}: more than the space differs.\n"
            f"{shown}\nIts trials would not compare with new ones. Put these back, or run the new "
            "study from its beginning."
        )


def _fitting(source: Study, space: Space) -> tuple[list[_Copy], dict[str, int]]:
    """The finished trials that the new space can suggest, and why the others are left out.

    Raises:
        WorkbenchError: none can be; says why.
    """
    copies: list[_Copy] = []
    left_out: Counter[str] = Counter()
    known: dict[str, Any] = {}  # values of parameters that the old space had fixed
    for trial in source.trials():
        original = trial.data.get("duplicate_of")
        if not (settles_layout(trial) or trial.outcome in ("duplicate", "infeasible")):
            left_out[f"outcome {trial.outcome}"] += 1
        elif not (trial.path / "layout.json").exists():
            left_out["no layout on record"] += 1
        elif original is not None and all(copy.old.number != original for copy in copies):
            left_out["a repeat of one that is left out"] += 1
        else:
            found, reason = replayed(space, trial.layout, trial.params, known)
            if found is None:
                left_out[reason] += 1
            else:
                copies.append(_Copy(trial, found.params, found.distributions))
    if not copies:
        reasons = "; ".join(f"{count} × {reason}" for reason, count in left_out.most_common(4))
        raise WorkbenchError(
            f"no trial of study {source.name!r} fits the new space: {reasons or 'it has none'}. "
            "The new space must offer what the old one did, and more."
        )
    return copies, dict(left_out)


def _clear(store: Store, parent: Parent, name: str) -> None:
    """Remove what a migration that was killed left in a storage of its own."""
    backend = storage.connect(store, parent.folder, parent, lambda message: None)
    found = storage.find_study(backend, name)
    if found is not None and found.user_attrs.get(UNFINISHED):
        optuna.delete_study(study_name=name, storage=backend)


@contextlib.contextmanager
def _undone(ledger: Ledger, store: Store) -> Iterator[None]:
    """Take the study out of a storage of its own again if it cannot be completed."""
    try:
        yield
    except BaseException:
        if store.url is not None and hasattr(ledger, "optuna"):
            optuna.delete_study(study_name=ledger.optuna.study_name, storage=ledger.optuna._storage)
        raise


def _copied(copies: list[_Copy], ledger: Ledger, source: Study) -> dict[int, int]:
    """Copy the trials' records and weights, and tell the storage of each."""
    numbers = {copy.old.number: number for number, copy in enumerate(copies)}
    for copy in copies:
        number = numbers[copy.old.number]
        path = ledger.path(number)
        path.mkdir(parents=True)
        for file in sorted(copy.old.path.iterdir()):
            if file.is_file() and file.name not in LEFT_BEHIND and file.suffix != ".tmp":
                _take(file, path / file.name)
        origin = f"{source.name}:{copy.old.number}"
        record = {
            **copy.old.data, "number": number, MIGRATED: origin, "params": copy.params,
            "retry_of": None, "attempt": 0,
        }  # fmt: skip
        if "duplicate_of" in record:
            record["duplicate_of"] = numbers[record["duplicate_of"]]
        write_json(path / "trial.json", record)
        ledger.optuna.add_trial(_told(copy, record))
    return numbers


def _take(file: Path, target: Path) -> None:
    """Weights are linked where the file system can; what may be edited by hand is copied."""
    if file.suffix == ".safetensors":
        with contextlib.suppress(OSError):
            os.link(file, target)
            return
    shutil.copy2(file, target)


def _told(copy: _Copy, record: dict[str, Any]) -> optuna.trial.FrozenTrial:
    """What the storage is told of a trial: what it would have been told in the new study."""
    return optuna.trial.create_trial(
        state=state_of(record),
        values=record.get("values"),
        params=copy.params,
        distributions=copy.distributions,
        constraints=record.get("constraints", {}),
        user_attrs={storage.SUGGESTION: record["number"], MIGRATED: record[MIGRATED]},
    )
