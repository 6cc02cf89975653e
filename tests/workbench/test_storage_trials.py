"""What is known of trials is what the storage has, whoever wrote it, and is not read again."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import optuna
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial
from sqlalchemy import event

from tests.workbench.ledgers import begin, end, one, open_ledger
from workbench import storage
from workbench.parents import joined
from workbench.storage_patience import PatientStorage
from workbench.storage_trials import KnownTrials

TPE = {"n_startup_trials": 4}


def engine_of(ledger):
    return ledger.optuna._storage._inner._backend.engine


def other_side(folder: Path) -> optuna.Study:
    """The study as another program sees it, without anything of ours in between."""
    return optuna.load_study(
        study_name="books", storage=RDBStorage(f"sqlite:///{folder / 'optuna.db'}")
    )


def play(ledger, theirs, dice: random.Random, running: list[optuna.Trial]) -> None:
    """One thing that this process or another one does to the study."""
    deed = dice.choice(["begin", "begin", "suggest", "tell", "tell", "note", "queue", "stranger"])
    if deed == "begin":
        running.append(storage.ask(ledger.optuna, {}, 0))
        with storage.suggesting(ledger.optuna):
            running[-1].suggest_float("x", 0.0, 1.0)
            running[-1].suggest_categorical("kind", ["a", 1, None, True])
    elif deed == "queue":
        params = {"x": dice.random(), "kind": "a"}
        attrs = {storage.SUGGESTION: 0}
        ledger.optuna.enqueue_trial(params, user_attrs=attrs)
    elif deed == "stranger":
        theirs.add_trial(create_trial(values=[dice.random(), 1.0]))
    elif running and deed == "suggest":
        with storage.suggesting(ledger.optuna):
            dice.choice(running).suggest_int(f"y{dice.randrange(3)}", 1, 9, step=2)
    elif running and deed == "note":
        dice.choice(running).set_user_attr("seen", [dice.random(), {"at": None}])
    elif running:
        trial = running.pop(dice.randrange(len(running)))
        state = dice.choice([TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL])
        values = [dice.random(), float("inf")] if state == TrialState.COMPLETE else None
        frozen = trial._cached_frozen_trial
        storage.tell(ledger.optuna, frozen, state, values, {"loss": dice.random() - 0.5})


@pytest.mark.parametrize("seed", range(3))
def test_what_is_known_is_what_the_storage_has(tmp_path, seed):
    dice, running, states = random.Random(seed), [], set()
    with joined(tmp_path / "books") as parent:
        ledger = open_ledger(parent)
        theirs = other_side(ledger.folder)
        for _ in range(40):
            play(ledger, theirs, dice, running)
            found = ledger.optuna.get_trials(deepcopy=False)
            assert found == theirs.get_trials()
            states |= {trial.state for trial in found}
            for trial in found:
                assert ledger.optuna._storage.get_trial(trial._trial_id) == trial
        assert states == set(TrialState)


def test_another_process_is_seen_though_its_trial_came_in_between(tmp_path):
    """Ours has a number above one that nobody here has read yet."""
    with joined(tmp_path / "books") as parent:
        ledger = open_ledger(parent)
        one(ledger)
        theirs = other_side(ledger.folder)
        backend = ledger.optuna._storage
        theirs.add_trial(create_trial(values=[0.5, 1.0]))
        backend.create_new_trial(ledger.optuna._study_id)
        assert ledger.optuna.get_trials() == theirs.get_trials()
        assert [t.number for t in ledger.optuna.get_trials()] == [0, 1, 2]


def test_what_was_handed_out_does_not_change_later(tmp_path):
    with joined(tmp_path / "books") as parent:
        ledger = open_ledger(parent)
        trial = storage.ask(ledger.optuna, {}, 0)
        before = ledger.optuna.get_trials(deepcopy=False)
        with storage.suggesting(ledger.optuna):
            trial.suggest_float("x", 0.0, 1.0)
        assert before[0].params == {}
        assert ledger.optuna.get_trials(deepcopy=False)[0].params == trial.params
        trial._cached_frozen_trial.params["x"] = 3.0  # an optuna.Trial keeps its own books
        assert ledger.optuna.get_trials(deepcopy=False)[0].params != trial.params


def test_a_write_that_fails_leaves_nothing_believed(tmp_path):
    with joined(tmp_path / "books") as parent:
        ledger = open_ledger(parent)
        trial = storage.ask(ledger.optuna, {}, 0)

        def interrupt(connection):
            raise KeyboardInterrupt

        def write():
            with storage.suggesting(ledger.optuna):
                trial.suggest_float("x", 0.0, 1.0)

        event.listen(engine_of(ledger), "commit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write()
        event.remove(engine_of(ledger), "commit", interrupt)
        assert ledger.optuna.get_trials() == other_side(ledger.folder).get_trials()


def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read everything from the storage each time, as if nothing was known."""
    monkeypatch.setattr(
        KnownTrials,
        "read",
        lambda self: self._database.get_all_trials(self._study_id, deepcopy=False),
    )
    monkeypatch.setattr(KnownTrials, "get", lambda self, trial_id: None)
    monkeypatch.setattr(KnownTrials, "id_of", lambda self, number: None)


def drawn(folder: Path, table: dict) -> list[dict]:
    """What a sampler suggests, three trials at a time."""
    with joined(folder) as parent:
        ledger = open_ledger(parent)
        running = []
        for number in range(16):
            trial = storage.ask(ledger.optuna, table, 5)
            with storage.suggesting(ledger.optuna):
                x = trial.suggest_float("x", 0.0, 1.0)
                kind = trial.suggest_categorical("kind", ["a", "b"])
                if kind == "b":
                    trial.suggest_int("y", 1, 64, log=True)
            running.append((trial, x))
            if len(running) == 3:
                ended, x = running.pop(number % 3)
                frozen = ended._cached_frozen_trial
                values = [x, (x - 0.3) ** 2]
                limits = {"loss": x - 0.9}
                storage.tell(ledger.optuna, frozen, TrialState.COMPLETE, values, limits)
        return [trial.params for trial in ledger.optuna.get_trials()]


@pytest.mark.parametrize(
    "table",
    [
        TPE,
        {"class": "optuna.samplers.NSGAIISampler", "population_size": 4},
        {"class": "optuna.samplers.RandomSampler"},
    ],
    ids=["TPE", "NSGA-II", "random"],
)
def test_what_is_suggested_does_not_depend_on_what_is_known(tmp_path, monkeypatch, table):
    ours = drawn(tmp_path / "ours" / "books", table)
    forgetful(monkeypatch)
    assert drawn(tmp_path / "theirs" / "books", table) == ours
    assert len({params["x"] for params in ours}) > 6


@contextlib.contextmanager
def counting(ledger):
    """Statements that the database executes inside."""
    statements: list[str] = []

    def executed(connection, cursor, statement, parameters, context, many):
        statements.append(statement)

    event.listen(engine_of(ledger), "before_cursor_execute", executed)
    try:
        yield statements
    finally:
        event.remove(engine_of(ledger), "before_cursor_execute", executed)


def test_a_trial_costs_the_storage_the_same_however_many_are_in_flight(tmp_path):
    """And few statements: it is what eight workers wait for."""
    with joined(tmp_path / "books") as parent:
        ledger = open_ledger(parent)
        counts = []
        for _ in range(3):
            one(ledger)
            with counting(ledger) as statements:
                one(ledger)
            counts.append(len(statements))
            for _ in range(4):
                begin(ledger)
        assert counts[0] == counts[1] == counts[2] < 40, counts


def test_a_trial_is_made_with_its_attributes_or_not_at_all(tmp_path):
    with joined(tmp_path / "books") as parent:
        ledger = open_ledger(parent)
        backend = ledger.optuna._storage
        assert isinstance(backend, PatientStorage)
        backend.attributes = {"odd": {1, 2}}  # no JSON
        with pytest.raises(TypeError):
            backend.create_new_trial(ledger.optuna._study_id)
        assert other_side(ledger.folder).get_trials() == ledger.optuna.get_trials() == []
        backend.attributes = {}
        trial, record = begin(ledger)
        assert other_side(ledger.folder).trials[0].user_attrs["parent"] == parent.id
        end(ledger, record)
        assert trial.number == 0
