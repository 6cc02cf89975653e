"""The trials of a study as the storage has them, read and written whole.

Optuna's own cache reads every unfinished trial again at each look, and its storage writes each
parameter and attribute by a query of its own. Here, what cannot have changed is not read again, and
what belongs to one trial is written at once.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    distribution_to_json,
    json_to_distribution,
)
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import (
    StudyModel,
    TrialModel,
    TrialParamModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
)
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial
from sqlalchemy import insert

Param = tuple[int, str, float, BaseDistribution]  # trial id, name, internal value, distribution
Attribute = tuple[int, str, Any]  # trial id, key, JSON data


def begin_trial(
    database: RDBStorage, study_id: int, user: dict[str, Any], system: dict[str, Any]
) -> FrozenTrial:
    """Make a running trial with its attributes, in one transaction."""
    with _create_scoped_session(database.scoped_session) as session:
        # Whoever else makes a trial waits: numbers are counted.
        StudyModel.find_or_raise_by_id(study_id, session, for_update=True)
        row: Any = database._get_prepared_new_trial(study_id, None, session)
        trial = FrozenTrial(
            number=row.number,
            trial_id=row.trial_id,
            state=row.state,
            datetime_start=row.datetime_start,
            datetime_complete=None,
            value=None,
            params={},
            distributions={},
            user_attrs=copy.deepcopy(user),
            system_attrs=copy.deepcopy(system),
            intermediate_values={},
        )
        for model, attributes in (
            (TrialUserAttributeModel, user),
            (TrialSystemAttributeModel, system),
        ):
            rows = [
                {"trial_id": trial._trial_id, "key": key, "value_json": json.dumps(value)}
                for key, value in attributes.items()
            ]
            session.execute(insert(model), rows)
    return trial


def write_trials(
    database: RDBStorage, params: Sequence[Param], attributes: Sequence[Attribute]
) -> None:
    """Write parameters and system attributes of unfinished trials, in one transaction.

    Where the parameters are there already, all of it is: from a try before.
    """
    with _create_scoped_session(database.scoped_session, True) as session:
        for trial in ids_of(params, attributes):
            row: Any = TrialModel.find_or_raise_by_id(trial, session)
            database.check_trial_is_updatable(trial, row.state)
        rows = [
            {
                "trial_id": trial,
                "param_name": name,
                "param_value": value,
                "distribution_json": distribution_to_json(distribution),
            }
            for trial, name, value, distribution in params
        ]
        if rows:
            session.execute(insert(TrialParamModel), rows)
        for trial, key, content in attributes:
            database._set_trial_attr_without_commit(
                session, TrialSystemAttributeModel, trial, key, content
            )


def ids_of(params: Iterable[Param], attributes: Iterable[Attribute]) -> set[int]:
    """The trials that some parameters and attributes belong to."""
    return {trial for trial, *_ in params} | {trial for trial, *_ in attributes}


class KnownTrials:
    """The trials of one study, of which only those are read that may have changed.

    Nobody but its parent changes a running trial (`parents`), and nobody one that has ended.

    Args:
        database: the storage.
        study_id: of the study in it.
    """

    def __init__(self, database: RDBStorage, study_id: int) -> None:
        self._database = database
        self._study_id = study_id
        self._trials: dict[int, FrozenTrial] = {}
        self._own: set[int] = set()  # begun and written by this process alone
        self._open: set[int] = set()  # others that have not ended: to be read again
        self._last = -1  # id up to which all trials are known

    def read(self) -> list[FrozenTrial]:
        """All trials, by number. They are not to be changed."""
        found = self._database._get_trials(
            self._study_id,
            states=None,
            included_trial_ids=self._open,
            trial_id_greater_than=self._last,
        )
        for trial in found:
            self._last = max(self._last, trial._trial_id)
            if trial._trial_id not in self._own:
                self._put(trial)
        return sorted(self._trials.values(), key=lambda trial: trial.number)

    def _put(self, trial: FrozenTrial) -> None:
        self._trials[trial._trial_id] = trial
        if trial.state.is_finished():
            self._open.discard(trial._trial_id)
        else:
            self._open.add(trial._trial_id)

    def began(self, trial: FrozenTrial) -> None:
        """Take in a trial that this process has just made."""
        self._trials[trial._trial_id] = trial
        self._own.add(trial._trial_id)
        if trial._trial_id == self._last + 1:  # else there may be others in between
            self._last = trial._trial_id

    def get(self, trial_id: int) -> FrozenTrial | None:
        """A copy of a trial; None where only the storage can tell."""
        trial = self._trials.get(trial_id)
        if trial is None or trial_id in self._open:
            return None
        return copy.deepcopy(trial)

    def id_of(self, number: int) -> int | None:
        """The id of a trial; None where only the storage can tell."""
        found = (trial for trial in reversed(self._trials.values()) if trial.number == number)
        return next((trial._trial_id for trial in found), None)

    def wrote(self, params: Sequence[Param], attributes: Sequence[Attribute]) -> None:
        """Take in what `write_trials` has written."""
        for trial_id in ids_of(params, attributes) & self._own:
            # Another one: who was given the trial before has it as it was then.
            trial = self._trials[trial_id] = copy.deepcopy(self._trials[trial_id])
            for whose, name, value, given in params:
                if whose == trial_id:  # as JSON gives it back
                    distribution = json_to_distribution(distribution_to_json(given))
                    trial.distributions[name] = distribution
                    trial.params[name] = distribution.to_external_repr(value)
            for whose, key, content in attributes:
                if whose == trial_id:
                    trial.system_attrs[key] = json.loads(json.dumps(content))

    def forget(self, trial_id: int) -> None:
        """What is known of a trial may no longer hold: it is read again."""
        if trial_id in self._own:
            self._own.discard(trial_id)
            self._open.add(trial_id)
