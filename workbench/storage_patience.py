"""A storage that waits out what passes: a lost connection, a locked file, a server that restarts.

Every read and write of a study goes through `PatientStorage`. What fails for a reason that may pass
is tried again, each time after asking whether the last try had gone through after all: a commit
whose answer was lost is found, and not made twice.

A suggestion would read all trials several times, and commit each parameter by itself. `together`
reads them once and commits once; `storage_trials` keeps what need not be read again.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import secrets
import time
from collections.abc import Callable, Container, Iterator, Sequence
from datetime import datetime
from typing import Any, TypeVar

from optuna.distributions import BaseDistribution, check_distribution_compatibility
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event
from sqlalchemy.engine import Engine, ExceptionContext

from workbench.parents import Parent
from workbench.storage_trials import (
    Attribute,
    KnownTrials,
    Param,
    begin_trial,
    ids_of,
    write_trials,
)

T = TypeVar("T")
Notice = Callable[[str], None]

FIRST_WAIT, LONGEST_WAIT = 0.1, 5.0  # seconds; doubled from try to try
QUIET = 1.0  # seconds of an outage before anybody is told
TOKEN = "workbench:token"
PARENT = "parent"
# Classes and codes of SQLSTATE that pass: connection, resources, deadlock, shutdown, lock.
PASSING_CLASSES = ("08",)
PASSING_STATES = ("40001", "40P01", "53300", "55P03", "57P01", "57P02", "57P03", "57P05")
PASSING_SQLITE = ("database is locked", "database table is locked", "database schema is locked")


class PassingError(Exception):
    """A failure of the database that may pass; what it said."""


class StorageGoneError(StorageInternalError):
    """The storage stayed away for longer than it may."""


def recognise_passing(engine: Engine) -> None:
    """Make an engine raise `PassingError` for what may pass.

    Optuna would turn the database's own error into one of its own, and where a trial is made try
    again without asking whether it was made.
    """

    @event.listens_for(engine, "handle_error")
    def translate(context: ExceptionContext) -> None:
        if not context.is_pre_ping and may_pass(context):
            raise PassingError(first_line(context.original_exception))


def may_pass(context: ExceptionContext) -> bool:
    """Whether the same statement may go through later."""
    error = context.original_exception
    if not isinstance(error, Exception):
        return False
    if type(error).__module__.startswith("sqlite3"):
        return str(error) in PASSING_SQLITE
    state = getattr(error, "sqlstate", None)
    if state is not None:
        return state in PASSING_STATES or state[:2] in PASSING_CLASSES
    # Without a state nothing was executed: the connection broke, or never came about.
    return context.is_disconnect or type(error).__name__ == "OperationalError"


def first_line(error: BaseException) -> str:
    """What a database says, without what follows."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


@dataclasses.dataclass
class _Together:
    """What is read once, and what is written at the end.

    Attributes:
        trials: of the study; None as long as nobody looked.
        params, attributes: each parameter and system attribute that was set.
    """

    trials: list[FrozenTrial] | None = None
    params: list[Param] = dataclasses.field(default_factory=list)
    attributes: list[Attribute] = dataclasses.field(default_factory=list)


class PatientStorage(BaseStorage):
    """Optuna's storage, tried again for a while where it fails for what may pass.

    Args:
        database: the storage; its engine went through `recognise_passing`.
        patience: seconds after which a storage that fails is given up.
        notice: is told once when the storage went away, and when it is back.
        parent: this process, whose id stands in every trial that it begins.
    """

    def __init__(
        self, database: RDBStorage, patience: float, notice: Notice, parent: Parent
    ) -> None:
        self._database = database
        self._inner = get_storage(database)  # remembers names and directions of studies
        self._known: dict[int, KnownTrials] = {}  # by study
        self._together: _Together | None = None
        self._distributions: dict[str, BaseDistribution] = {}
        self._patience = patience
        self._notice = notice
        self.parent = parent
        self.attributes: dict[str, Any] = {}  # of the next trial that is made
        self.asked_on: list[FrozenTrial] | None = None  # all trials, as the last one was asked for

    def _do(self, call: Callable[[], T], done: Callable[[], T | None] | None = None) -> T:
        """`call`, tried until it goes through.

        Args:
            done: asked before each further try whether one before had gone through: its result,
                or None.

        Raises:
            StorageGoneError: the storage stayed away; says since when, and what it said last.
        """
        outage: _Outage | None = None
        while True:
            try:
                result = None if outage is None or done is None else done()
                if result is None:
                    result = call()
                if outage is not None:
                    outage.over()
                return result
            except PassingError as error:
                outage = outage or _Outage(self._patience, self._notice)
                outage.wait(str(error))

    @contextlib.contextmanager
    def together(self, trials: list[FrozenTrial] | None = None) -> Iterator[None]:
        """Inside, all trials are read once, and what is set of a trial is written at the end.

        Nobody else sees it before, and whoever set it must not read it back from here: Optuna's
        trials remember what they suggested. Nothing is written where the storage itself failed.

        Args:
            trials: as they were read just now; None reads them once somebody looks.

        Raises:
            StorageGoneError: the storage stayed away.
        """
        held = self._together = _Together(trials)
        try:
            yield
        except StorageInternalError:
            held.params, held.attributes = [], []
            raise
        finally:
            self._together = None
            if held.params or held.attributes:
                self._write(held)

    def _write(self, held: _Together) -> None:
        for _, name, _, distribution in held.params:
            self._distributions.setdefault(name, distribution)
        try:
            self._do(lambda: write_trials(self._database, held.params, held.attributes))
        except BaseException:
            for trial in ids_of(held.params, held.attributes):
                self._forget(trial)
            raise
        for known in self._known.values():
            known.wrote(held.params, held.attributes)

    def _forget(self, trial_id: int) -> None:
        for known in self._known.values():
            known.forget(trial_id)

    def _trials_of(self, study_id: int) -> KnownTrials:
        if study_id not in self._known:
            self._known[study_id] = KnownTrials(self._database, study_id)
        return self._known[study_id]

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        token = secrets.token_hex(8)
        known = self._trials_of(study_id)

        def done() -> int | None:
            made = (t for t in known.read() if t.system_attrs.get(TOKEN) == token)
            return next((trial._trial_id for trial in made), None)

        def make() -> int:
            if template_trial is not None:
                template = copy.deepcopy(template_trial)
                template.system_attrs[TOKEN] = token
                return self._database.create_new_trial(study_id, template)
            user = {PARENT: self.parent.id, **self.attributes}
            trial = begin_trial(self._database, study_id, user, {TOKEN: token})
            known.began(trial)
            return trial._trial_id

        return self._do(make, done)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        self._forget(trial_id)

        def done() -> bool | None:
            trial = self._database.get_trial(trial_id)
            told = None if values is None else list(values)
            mine = state != TrialState.RUNNING or trial.user_attrs.get(PARENT) == self.parent.id
            return True if trial.state == state and trial.values == told and mine else None

        return self._do(
            lambda: self._database.set_trial_state_values(trial_id, state, values), done
        )

    def create_new_study(
        self, directions: Sequence[StudyDirection], study_name: str | None = None
    ) -> int:
        return self._do(lambda: self._inner.create_new_study(directions, study_name))

    def delete_study(self, study_id: int) -> None:
        self._known.pop(study_id, None)
        self._do(lambda: self._inner.delete_study(study_id))

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        self._do(lambda: self._inner.set_study_user_attr(study_id, key, value))

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._do(lambda: self._inner.set_study_system_attr(study_id, key, value))

    def get_study_id_from_name(self, study_name: str) -> int:
        return self._do(lambda: self._inner.get_study_id_from_name(study_name))

    def get_study_name_from_id(self, study_id: int) -> str:
        return self._do(lambda: self._inner.get_study_name_from_id(study_id))

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return self._do(lambda: self._inner.get_study_directions(study_id))

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return self._do(lambda: self._inner.get_study_user_attrs(study_id))

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self._do(lambda: self._inner.get_study_system_attrs(study_id))

    def get_all_studies(self) -> list[Any]:
        return self._do(self._inner.get_all_studies)

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        if self._together is not None:
            before = self._distributions.get(param_name, distribution)
            check_distribution_compatibility(before, distribution)
            param = (trial_id, param_name, param_value_internal, distribution)
            self._together.params.append(param)
            return
        self._forget(trial_id)
        # A parameter that is there already is left as it is: the same one, from a try before.
        self._do(
            lambda: self._database.set_trial_param(
                trial_id, param_name, param_value_internal, distribution
            )
        )

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        known = self._trials_of(study_id).id_of(trial_number)
        if known is not None:
            return known
        find = self._database.get_trial_id_from_study_id_trial_number
        return self._do(lambda: find(study_id, trial_number))

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        self._forget(trial_id)
        self._do(
            lambda: self._database.set_trial_intermediate_value(trial_id, step, intermediate_value)
        )

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._forget(trial_id)
        self._do(lambda: self._database.set_trial_user_attr(trial_id, key, value))

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        if self._together is not None:
            self._together.attributes.append((trial_id, key, value))
            return
        self._forget(trial_id)
        self._do(lambda: self._database.set_trial_system_attr(trial_id, key, value))

    def get_trial(self, trial_id: int) -> FrozenTrial:
        found = (known.get(trial_id) for known in self._known.values())
        known = next((trial for trial in found if trial is not None), None)
        return known or self._do(lambda: self._database.get_trial(trial_id))

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        held = self._together
        trials = None if held is None else held.trials
        if trials is None:
            trials = self._do(self._trials_of(study_id).read)
            if held is not None:
                held.trials = trials
        trials = [trial for trial in trials if states is None or trial.state in states]
        return copy.deepcopy(trials) if deepcopy else trials

    def remove_session(self) -> None:
        self._inner.remove_session()


class _Outage:
    """One time that the storage is away, from the first failure on."""

    def __init__(self, patience: float, notice: Notice) -> None:
        self._patience = patience
        self._notice = notice
        self._began = time.monotonic()
        self._since = datetime.now().strftime("%H:%M:%S")
        self._told = False
        self._pause = FIRST_WAIT

    def wait(self, reason: str) -> None:
        """Pause before the next try.

        Raises:
            StorageGoneError: patience is at its end.
        """
        away = time.monotonic() - self._began
        if away + self._pause > self._patience:
            raise StorageGoneError(
                f"it has been away for {away:.0f} s, since {self._since} ({reason})"
            )
        if away > QUIET and not self._told:
            self._told = True
            self._notice(
                f"storage unreachable since {self._since} ({reason}): trying again for "
                f"{self._patience - away:.0f} s"
            )
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, LONGEST_WAIT)

    def over(self) -> None:
        """The storage answers again."""
        if self._told:
            self._notice(f"storage back after {time.monotonic() - self._began:.0f} s")
