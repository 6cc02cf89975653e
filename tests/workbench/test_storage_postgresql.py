"""PostgreSQL, a real one: wrong credentials, outages, several parents, and a password kept."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.workbench.ledgers import (
    assert_books_agree,
    begin,
    end,
    one,
    open_ledger,
    try_to_open,
)
from tests.workbench.postgres import PASSWORD, Server, running
from tests.workbench.test_parents import kill, say, start
from workbench import WorkbenchError, storage
from workbench.parents import joined
from workbench.storage_url import Store

pytestmark = pytest.mark.xdist_group("postgresql")  # one server for all
names = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as started:
        yield started


@pytest.fixture
def url(server: Server) -> str:
    """Of an empty database."""
    name = f"studies{next(names)}"
    address = server.url().replace("+psycopg", "")
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return server.url(database=name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "books"


def assert_no_password(folder: Path, *texts: str) -> None:
    """Neither the password nor any part of it that a wrong split would leave."""
    contents = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    for text in (*contents, *(text.encode() for text in texts)):
        for form in (PASSWORD, "S3cr", "S3cr%25t", "{x}", "%7Bx%7D"):
            assert form.encode() not in text


def test_a_study_on_postgresql_is_kept_and_resumed(folder, url):
    with joined(folder) as parent:
        ledger = open_ledger(parent, Store(url))
        for _ in range(3):
            one(ledger)
    with joined(folder) as parent:
        ledger = open_ledger(parent, Store(url))
        assert ledger.judged == 3
        one(ledger)
        assert_books_agree(ledger)
    shown = json.loads((folder / "study.json").read_text())["storage"]
    assert shown == url.replace("S3cr%25t%40%2F%7Bx%7D", "***")
    assert not (folder / "optuna.db").exists()
    assert_no_password(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"password": PASSWORD + "x"}, "password authentication failed for user"),
        ({"database": "nowhere"}, 'database "nowhere" does not exist'),
        ({"port": 1}, "Connection refused"),
        ({"host": "no-such-host.invalid"}, "resolve"),
    ],
)
def test_what_cannot_be_reached_is_a_message_at_once(folder, server, change, words):
    clock = time.monotonic()
    with pytest.raises(WorkbenchError, match=words) as caught, joined(folder) as parent:
        open_ledger(parent, Store(server.url(**change)))
    assert time.monotonic() - clock < 20
    assert "nothing was changed" in str(caught.value)
    assert_no_password(folder, str(caught.value))
    assert caught.value.__cause__ is None
    assert not folder.exists()


def test_a_study_resumed_without_its_url_says_which(folder, url):
    with joined(folder) as parent:
        one(open_ledger(parent, Store(url)))
    words = r"keeps its trials in postgresql.*\*\*\*@127"
    with pytest.raises(WorkbenchError, match=words) as caught:
        try_to_open(folder)
    assert "WORKBENCH_STORAGE" in str(caught.value)
    assert not (folder / "optuna.db").exists()
    assert_no_password(folder, str(caught.value))


def test_an_outage_of_seconds_loses_and_doubles_nothing(folder, url, server, monkeypatch):
    """The server goes down in the middle of a transaction, and between trials, and comes back."""
    heard: list[str] = []
    with joined(folder) as parent:
        ledger = open_ledger(parent, Store(url, 60.0), heard.append)
        one(ledger)
        for _ in range(2):
            _, record = begin(ledger)
            server.stop()
            back = threading.Timer(2.0, server.start)
            back.start()
            end(ledger, record)
            back.join()
            one(ledger)
        assert ledger.judged == 5
        assert_books_agree(ledger)
    assert [words.partition(" ")[2].partition(" ")[0] for words in heard] == [
        "unreachable", "back", "unreachable", "back",
    ]  # fmt: skip
    assert_no_password(folder, *heard)


def test_an_outage_longer_than_patience_ends_the_run_and_the_next_goes_on(folder, url, server):
    store = Store(url, 1.0)
    with joined(folder) as parent:
        ledger = open_ledger(parent, store)
        _, record = begin(ledger)
        server.stop()
        words = "it has been away for"
        with (
            pytest.raises(WorkbenchError, match=words) as caught,
            storage.reporting_failures(folder, store),
        ):
            end(ledger, record)
        server.start()
    assert_no_password(folder, str(caught.value))
    with joined(folder) as parent:
        ledger = open_ledger(parent, Store(url))
        assert ledger.judged == 1  # its record was whole: told now
        assert_books_agree(ledger)


@pytest.mark.parametrize("went_through", [True, False])
def test_every_commit_may_break_the_connection(folder, url, went_through):
    failing = {"at": -1, "count": 0}
    lost: list[int] = []
    with joined(folder) as parent:
        ledger = open_ledger(parent, Store(url))
        engine = ledger.optuna._storage._inner._backend.engine
        real = engine.dialect.do_commit

        def commit(connection):
            failing["count"] += 1
            fails = failing["count"] == failing["at"]
            if went_through or not fails:
                real(connection)
            if fails:
                lost.append(failing["count"])
                backend = connection.dbapi_connection.info.backend_pid
                with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as other:
                    other.execute("SELECT pg_terminate_backend(%s)", (backend,))
                time.sleep(0.1)
                real(connection)
                connection.cursor().execute("SELECT 1")

        engine.dialect.do_commit = commit
        for at in range(1, 60):
            failing.update(at=at, count=0)
            _, record = begin(ledger)
            end(ledger, record, "interrupted" if at % 5 == 0 else "complete")
            if not lost or lost[-1] != at:
                break
        assert len(lost) >= 6, "no commit failed"
        assert_books_agree(ledger)


def test_parents_share_a_postgresql_and_one_takes_over_from_another(folder, url):
    dead, living = start(folder, url), start(folder, url)
    hung = int(say(dead, "hang")[1])
    for _ in range(3):
        assert say(living, "on")[0] == "done"
    kill(dead)
    with joined(folder) as parent:
        ledger = open_ledger(parent, Store(url))
        assert one(ledger).data["retry_of"] == hung
        assert say(living, "on")[0] == "done"
        living.communicate()
        ledger.refresh()
        assert ledger.judged == 5
        assert_books_agree(ledger)
    assert_no_password(folder)
