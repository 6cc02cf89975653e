"""What passes is waited out, once and without doing anything twice; the rest is a message."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import event

from tests.workbench.ledgers import (
    OBJECTIVES,
    SAMPLER,
    assert_books_agree,
    begin,
    end,
    one,
    open_ledger,
    try_to_open,
)
from workbench import WorkbenchError, storage
from workbench.parents import joined
from workbench.storage_patience import PassingError, StorageGoneError
from workbench.storage_url import Store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "books"


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite itself waits a fifth of a second; what is told is told at once."""
    real = storage._engine_arguments
    monkeypatch.setattr(
        storage, "_engine_arguments", lambda url: {**real(url), "connect_args": {"timeout": 0.2}}
    )
    monkeypatch.setattr("workbench.storage_patience.QUIET", 0.0)


def engine_of(ledger):
    return ledger.optuna._storage._inner._backend.engine


class Locked:
    """Another process's transaction on the database, for some seconds."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.connection = sqlite3.connect(folder / "optuna.db", check_same_thread=False)
        self.connection.execute("BEGIN EXCLUSIVE")
        self.timer = threading.Timer(seconds, self.release)
        self.timer.start()

    def release(self) -> None:
        self.connection.rollback()
        self.connection.close()


def test_a_locked_database_is_waited_for_and_told_of_once(folder):
    heard: list[str] = []
    with joined(folder) as parent:
        ledger = open_ledger(parent, notice=heard.append)
        _, record = begin(ledger)
        lock = Locked(folder, 2.0)
        end(ledger, record)
        lock.timer.join()
        assert [words.split(" since")[0].split(" after")[0] for words in heard] == [
            "storage unreachable",
            "storage back",
        ]
        assert "database is locked" in heard[0]
        one(ledger)
        assert_books_agree(ledger)


def test_patience_has_an_end_and_the_trial_is_told_on_resume(folder):
    with joined(folder) as parent:
        ledger = open_ledger(parent, Store(None, 0.5))
        _, record = begin(ledger)
        lock = Locked(folder, 3600.0)
        words = r"away for \d s, since .*database is locked.*run it"
        with pytest.raises(WorkbenchError, match=words), storage.reporting_failures(folder):
            end(ledger, record)
    lock.timer.cancel()
    lock.release()
    with joined(folder) as parent:
        ledger = open_ledger(parent)
        assert ledger.judged == 1
        assert_books_agree(ledger)


def test_a_database_locked_at_the_start_is_a_message_and_leaves_nothing(tmp_path):
    path = tmp_path / "shared.db"
    connection = sqlite3.connect(path)
    connection.execute("BEGIN EXCLUSIVE")
    folder = tmp_path / "runs" / "books"
    words = r"cannot open .*shared\.db: .*database is locked.*Another program holds the file"
    with pytest.raises(WorkbenchError, match=words):
        try_to_open(folder, Store(f"sqlite:///{path}"))
    connection.close()
    assert not folder.exists()


def test_a_file_that_is_no_database_is_a_message(tmp_path):
    (tmp_path / "shared.db").write_text("of no use " * 200)
    for name, words in (
        ("shared.db", r"cannot open .*not a database.*the file, if there is one, a SQLite"),
        ("nowhere/shared.db", r"cannot open .*unable to open database file.*Its folder must be"),
    ):
        with pytest.raises(WorkbenchError, match=words):
            try_to_open(tmp_path / "books", Store(f"sqlite:///{tmp_path}/{name}"))


@pytest.mark.parametrize("went_through", [True, False])
def test_every_commit_may_lose_its_answer(folder, went_through):
    """Each commit of two trials in turn fails once; whether it went through makes no difference."""
    failing = {"at": -1, "count": 0}
    lost: list[int] = []

    with joined(folder) as parent:
        ledger = open_ledger(parent, notice=lambda message: None)
        engine = engine_of(ledger)
        real = engine.dialect.do_commit

        def commit(connection):
            failing["count"] += 1
            fails = failing["count"] == failing["at"]
            if went_through or not fails:
                real(connection)
            if fails:
                lost.append(failing["count"])
                raise sqlite3.OperationalError("database is locked")

        engine.dialect.do_commit = commit
        for at in range(1, 60):
            failing.update(at=at, count=0)
            _, record = begin(ledger)
            end(ledger, record, "interrupted" if at % 5 == 0 else "complete")
            if not lost or lost[-1] != at:
                break
        assert len(lost) >= 6, "no commit failed"
        assert_books_agree(ledger)


def drawn(folder: Path, number: int) -> dict[str, float]:
    """A trial's parameters as another process sees them."""
    with sqlite3.connect(folder / "optuna.db") as connection:
        rows = connection.execute(
            "SELECT param_name, param_value FROM trial_params WHERE trial_id = ?", (number + 1,)
        )
        return dict(rows.fetchall())


def test_what_a_trial_draws_is_stored_at_once_whatever_ends_it(folder):
    with joined(folder) as parent:
        ledger = open_ledger(parent)
        commits: list[int] = []
        for number, ending in enumerate((None, ValueError, KeyboardInterrupt)):
            trial = storage.ask(ledger.optuna, SAMPLER, 0)
            commits.clear()
            event.listen(engine_of(ledger), "commit", lambda connection: commits.append(1))
            with (
                contextlib.suppress(ValueError, KeyboardInterrupt),
                storage.suggesting(ledger.optuna),
            ):
                for name in "abcd":
                    trial.suggest_float(name, 0.0, 1.0)
                assert drawn(folder, number) == {}
                if ending is not None:
                    raise ending
            assert drawn(folder, number) == trial.params
            if number == 0:
                assert len(commits) == 1
        assert [t.params.keys() for t in ledger.optuna.get_trials()] == [{*"abcd"}] * 3


def test_an_incompatible_range_is_refused_where_it_is_drawn(folder):
    with joined(folder) as parent:
        ledger = open_ledger(parent)
        with storage.suggesting(ledger.optuna):
            storage.ask(ledger.optuna, SAMPLER, 0).suggest_float("x", 0.0, 1.0)
        trial = storage.ask(ledger.optuna, SAMPLER, 0)
        with storage.suggesting(ledger.optuna):
            with pytest.raises(ValueError, match="distribution"):
                trial.suggest_categorical("x", ["a", "b"])
            trial.suggest_float("y", 0.0, 1.0)
        assert drawn(folder, 1) == {"y": trial.params["y"]}


def test_what_will_not_pass_is_not_waited_for(folder):
    with joined(folder) as parent:
        ledger = open_ledger(parent)
        _, record = begin(ledger)

        @event.listens_for(engine_of(ledger), "before_cursor_execute")
        def full(connection, cursor, statement, parameters, context, many):
            if statement.startswith("UPDATE"):
                raise sqlite3.OperationalError("database or disk is full")

        clock = time.monotonic()
        words = "database or disk is full"
        with pytest.raises(WorkbenchError, match=words), storage.reporting_failures(folder):
            end(ledger, record)
        assert time.monotonic() - clock < 5.0


def test_what_gives_up_is_what_the_study_lets_through(folder):
    from optuna.exceptions import StorageInternalError

    assert issubclass(StorageGoneError, StorageInternalError)
    assert not issubclass(PassingError, StorageInternalError)  # Optuna would try again by itself


def test_directions_that_differ_are_refused(folder, monkeypatch):
    with joined(folder) as parent:
        one(open_ledger(parent))
    monkeypatch.setattr("tests.workbench.ledgers.OBJECTIVES", OBJECTIVES[::-1])
    with pytest.raises(WorkbenchError, match="other objectives"), joined(folder) as parent:
        open_ledger(parent)
