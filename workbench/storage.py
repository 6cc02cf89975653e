"""Optuna's side of a study: storage, sampler, ask and tell."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.samplers import BaseSampler
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.study._tell import _tell_with_warning
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from workbench.errors import FieldError, WorkbenchError
from workbench.parents import Parent
from workbench.records import Objective
from workbench.storage_patience import (
    PARENT,
    Notice,
    PatientStorage,
    first_line,
    recognise_passing,
)
from workbench.storage_url import Store, default_url, redacted, scrubbed

DEFAULT_SAMPLER = "optuna.samplers.TPESampler"
DEFAULT_ARGUMENTS = {"multivariate": True, "group": True}
RETRY_OF = "retry_of"
ATTEMPT = "attempt"
SUGGESTION = "suggestion"
IDENTITY = "workbench:study"
STALE = 10
DEFAULT = Store()
UNREACHED = (
    ". Check its host, port, user, password and database; nothing was changed. --storage or "
    "WORKBENCH_STORAGE gives another."
)
UNOPENED = (
    ". Its folder must be there and writable, and the file, if there is one, a SQLite database; "
    "nothing was changed."
)
LOCKED = ". Another program holds the file: end that, or wait for it; nothing was changed."

optuna.logging.set_verbosity(optuna.logging.WARNING)
# Ctrl-C in the middle of a query: SQLAlchemy would log the traceback and then raise it anyway.
logging.getLogger("sqlalchemy").setLevel(logging.CRITICAL)


def connect(store: Store, folder: Path, parent: Parent, notice: Notice) -> PatientStorage:
    """The storage of the study in `folder`, with its tables; nothing of the study is in it yet.

    Args:
        store: where; None for `optuna.db` in the folder.
        notice: is told when the storage goes away and when it is back.

    Raises:
        WorkbenchError: it cannot be reached or opened: at once, and without its password.
    """
    url = store.url or default_url(folder)
    try:
        try:
            backend = _opened(url)
        except SQLAlchemyError as error:
            if not _made_meanwhile(error):
                raise
            backend = _opened(url)
    except ImportError:
        raise WorkbenchError(
            f"the storage {redacted(url)} needs a driver that is not installed: "
            "pip install 'lm-workbench[postgresql]'"
        ) from None
    except (SQLAlchemyError, StorageInternalError, RuntimeError) as error:
        raise WorkbenchError(
            f"cannot open the storage {redacted(url)}: {_said(error, url)}{_advice(url, error)}"
        ) from None
    recognise_passing(backend.engine)
    parent.closing.callback(backend.engine.dispose)
    parent.closing.callback(backend.remove_session)
    return PatientStorage(backend, store.patience, notice, parent)


def _advice(url: str, error: Exception) -> str:
    if not url.startswith("sqlite"):
        return UNREACHED
    return LOCKED if "locked" in str(error) else UNOPENED


def _opened(url: str) -> RDBStorage:
    template = url.replace("{", "{{").replace("}", "}}")  # Optuna takes a format string
    return RDBStorage(template, engine_kwargs=_engine_arguments(url))


def _made_meanwhile(error: SQLAlchemyError) -> bool:
    """Whether another process was making the same tables of a new database."""
    return isinstance(error, IntegrityError) or "already exists" in str(error)


def _engine_arguments(url: str) -> dict[str, Any]:
    """Connections that notice soon when the other side is gone."""
    if url.startswith("sqlite"):
        # Longer waits are the patience's, which Ctrl-C can interrupt.
        return {"connect_args": {"timeout": 10}}
    limits = {
        "connect_timeout": 10,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "tcp_user_timeout": 60_000,
    }
    asked = make_url(url).query
    arguments = {name: value for name, value in limits.items() if name not in asked}
    return {"pool_pre_ping": True, "connect_args": arguments}


def find_study(backend: PatientStorage, name: str) -> optuna.Study | None:
    """The study that the storage has under a name."""
    try:
        return optuna.load_study(study_name=name, storage=backend)
    except KeyError:
        return None


def open_study(
    backend: PatientStorage, name: str, objectives: tuple[Objective, ...], identity: str
) -> optuna.Study:
    """A study in the storage, made if it is not there.

    Args:
        identity: of the study's folder: what tells it from another folder's of the same name.

    Raises:
        WorkbenchError: it has other directions.
    """
    study = optuna.create_study(
        study_name=name,
        storage=backend,
        directions=[StudyDirection[objective.direction.upper()] for objective in objectives],
        load_if_exists=True,
    )
    directions = [direction.name.lower() for direction in study.directions]
    if directions != [objective.direction for objective in objectives]:
        raise WorkbenchError(f"the storage holds a study {name!r} of other objectives.")
    if study.user_attrs.get(IDENTITY) != identity:
        study.set_user_attr(IDENTITY, identity)
    with _experimental():
        study.set_metric_names([objective.name for objective in objectives])
    return study


@contextlib.contextmanager
def _experimental() -> Iterator[None]:
    """Features that Optuna calls experimental and this product has measured or needs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


@contextlib.contextmanager
def reporting_failures(folder: Path, store: Store = DEFAULT) -> Iterator[None]:
    """Turn the storage's own failures (a full disk, a server that stays away) into a message.

    Raises:
        WorkbenchError: what the storage said, and that resuming is safe.
    """
    url = store.url or default_url(folder)
    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        # Not chained: a database's error may hold what it was asked to connect to.
        raise WorkbenchError(
            f"the storage {redacted(url)} failed: {_said(error, url)}. Nothing recorded is lost: "
            "mend the cause (disk space, permissions, the server) and run it again."
        ) from None


def _said(error: BaseException, url: str) -> str:
    return scrubbed(first_line(error.__cause__ or error), url)


def make_sampler(table: Mapping[str, Any], seed: int) -> BaseSampler:
    """The sampler of a study's `[sampler]` table.

    Args:
        table: `class` is an import string; the other keys are passed to it. Without a class:
            `TPESampler(multivariate=True, group=True)`.
        seed: passed as `seed` where the class takes one and the table gives none.

    Raises:
        FieldError: no such class, no sampler, or arguments that it refuses.
    """
    arguments = dict(table)
    name = arguments.pop("class", None)
    if name is None:
        name, arguments = DEFAULT_SAMPLER, {**DEFAULT_ARGUMENTS, **arguments}
    module, _, attribute = str(name).rpartition(".")
    try:
        sampler_class = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise FieldError(
            "sampler.class",
            f"{name!r} cannot be imported ({error}): give a full name such as {DEFAULT_SAMPLER}",
        ) from None
    if not (isinstance(sampler_class, type) and issubclass(sampler_class, BaseSampler)):
        raise FieldError("sampler.class", f"{name!r} is no optuna sampler")
    if "seed" in inspect.signature(sampler_class).parameters:
        arguments.setdefault("seed", seed)
    try:
        with _experimental():
            return sampler_class(**arguments)
    except (TypeError, ValueError) as error:
        raise FieldError("sampler", f"{name} refuses its arguments: {error}") from None


def derived_seed(seed: int, count: int) -> int:
    """A 32-bit seed for the `count`-th suggestion of a study: the same after a resume."""
    digest = hashlib.sha256(f"{seed}:{count}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def ask(study: optuna.Study, table: Mapping[str, Any], seed: int, stale: int = 0) -> optuna.Trial:
    """The next trial, suggested by a sampler that is seeded by the suggestion's number alone.

    A study that is stopped and resumed therefore suggests what it would have without the stop: a
    run again after a fault has the number of the suggestion that it repeats.

    Args:
        stale: suggestions in a row that held nothing new. A model-based sampler can repeat its
            favourite for ever; after `STALE` of them suggestions are random until one is new.
    """
    if stale >= STALE:
        table = {"class": "optuna.samplers.RandomSampler"}
    backend = _patient(study)
    # One parent at a time: or two would count the same suggestions, and draw the same one.
    with backend.parent.exclusive():
        backend.asked_on = trials = study.get_trials(deepcopy=False)
        waiting = next((trial for trial in trials if trial.state == TrialState.WAITING), None)
        if waiting is not None:
            number = int(waiting.user_attrs[SUGGESTION])
            backend.set_trial_user_attr(waiting._trial_id, PARENT, backend.parent.id)
        else:
            number = sum(RETRY_OF not in trial.user_attrs for trial in trials)
            backend.attributes = {SUGGESTION: number}
        study.sampler = make_sampler(table, derived_seed(seed, number))
        backend.parent.asking = True
        if waiting is not None:
            return study.ask()
        # `Study.ask` without its search for a trial that waits: it would read all trials again.
        study._thread_local.cached_all_trials = None
        return optuna.Trial(study, backend.create_new_trial(study._study_id))


def suggesting(study: optuna.Study) -> contextlib.AbstractContextManager[None]:
    """Inside, the trial that was just asked for draws its parameters; they are stored at the end.

    The sampler looks at the trials that were there when it was asked for.
    """
    backend = _patient(study)
    trials, backend.asked_on = backend.asked_on, None
    return backend.together(trials)


def _patient(study: optuna.Study) -> PatientStorage:
    assert isinstance(study._storage, PatientStorage)
    return study._storage


def tell(
    study: optuna.Study,
    trial: FrozenTrial,
    state: TrialState,
    values: list[float] | None,
    constraints: Mapping[str, float],
) -> None:
    """Report a trial's end, its constraints first."""
    missing = {name: value for name, value in constraints.items() if name not in trial.constraints}
    if missing:
        with _patient(study).together():
            # The only way to set a constraint on a trial that an earlier process asked for.
            handle = optuna.Trial(study, trial._trial_id)
            for name, violation in missing.items():
                handle.set_constraint(name, violation)
    # `Study.tell` without reading back what it told.
    _tell_with_warning(study, trial.number, values, state)


def enqueue_retry(
    study: optuna.Study, failed: FrozenTrial, params: Mapping[str, Any], attempt: int
) -> None:
    """Queue a trial's parameters again, once; `attempt` counts the faults of its own making."""
    trials = study.get_trials(deepcopy=False)
    if any(trial.user_attrs.get(RETRY_OF) == failed.number for trial in trials):
        return
    suggestion = failed.user_attrs.get(
        SUGGESTION, sum(RETRY_OF not in trial.user_attrs for trial in trials[: failed.number])
    )
    attrs = {RETRY_OF: failed.number, ATTEMPT: attempt, SUGGESTION: suggestion}
    study.enqueue_trial(dict(params), user_attrs=attrs)


def unfinished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that some process began and never finished."""
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
