"""Optuna's side of a study: storage, sampler, ask and tell. One process writes."""

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
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from workbench.errors import FieldError, WorkbenchError
from workbench.records import Objective

DEFAULT_SAMPLER = "optuna.samplers.TPESampler"
DEFAULT_ARGUMENTS = {"multivariate": True, "group": True}
RETRY_OF = "retry_of"
ATTEMPT = "attempt"
SUGGESTION = "suggestion"
STALE = 10

optuna.logging.set_verbosity(optuna.logging.WARNING)
# Ctrl-C in the middle of a query: SQLAlchemy would log the traceback and then raise it anyway.
logging.getLogger("sqlalchemy").setLevel(logging.CRITICAL)


def open_storage(folder: Path, name: str, objectives: tuple[Objective, ...]) -> optuna.Study:
    """The study in `folder/optuna.db`, made if it is not there.

    Raises:
        WorkbenchError: the storage cannot be opened, or holds a study of other directions.
    """
    url = f"sqlite:///{folder / 'optuna.db'}"
    try:
        study = optuna.create_study(
            study_name=name,
            storage=url,
            directions=[StudyDirection[objective.direction.upper()] for objective in objectives],
            load_if_exists=True,
        )
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
        raise WorkbenchError(
            f"cannot open the storage {folder / 'optuna.db'}: {_first_line(error)}"
        ) from None
    directions = [direction.name.lower() for direction in study.directions]
    if directions != [objective.direction for objective in objectives]:
        raise WorkbenchError(f"{folder / 'optuna.db'} holds a study of other objectives.")
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
def reporting_failures(folder: Path) -> Iterator[None]:
    """Turn the storage's own failures (a full disk, a locked database) into a message.

    Raises:
        WorkbenchError: what the storage said, and that resuming is safe.
    """
    try:
        yield
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
        raise WorkbenchError(
            f"the storage {folder / 'optuna.db'} failed: {_first_line(error)}. Nothing "
            "recorded is lost: mend the cause (disk space, permissions) and run it again."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error.__cause__ or error).splitlines()[0]


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
    trials = study.get_trials(deepcopy=False)
    waiting = next((trial for trial in trials if trial.state == TrialState.WAITING), None)
    if waiting is not None:
        number = int(waiting.user_attrs[SUGGESTION])
    else:
        number = sum(RETRY_OF not in trial.user_attrs for trial in trials)
    study.sampler = make_sampler(table, derived_seed(seed, number))
    asked = study.ask()
    if waiting is None:
        asked.set_user_attr(SUGGESTION, number)
    return asked


def tell(
    study: optuna.Study,
    trial: FrozenTrial,
    state: TrialState,
    values: list[float] | None,
    constraints: Mapping[str, float],
) -> None:
    """Report a trial's end, its constraints first."""
    # The only way to set a constraint on a trial that an earlier process asked for.
    handle = optuna.Trial(study, trial._trial_id)
    for name, violation in constraints.items():
        if name not in trial.constraints:
            handle.set_constraint(name, violation)
    study.tell(trial.number, values, state)


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
