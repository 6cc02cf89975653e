"""Several processes on one study: who lives, whose turn it is, who takes over what."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import optuna
import pytest

from tests.workbench.ledgers import (
    SAMPLER,
    assert_books_agree,
    begin,
    end,
    forking,
    one,
    open_ledger,
    toil,
    try_to_open,
)
from workbench import WorkbenchError, storage
from workbench.errors import DiskError
from workbench.ledger import Ledger
from workbench.parents import Parent, joined
from workbench.records import Study, Trial
from workbench.storage_url import Store, default_url


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "books"


def start(folder: Path, url: str = "default", trials: int = 100) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.workbench.ledgers", url, str(folder), str(trials)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert hear(process)[0] == "open"
    return process


def hear(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    return process.stdout.readline().split()


def say(process: subprocess.Popen[str], word: str) -> list[str]:
    """Let the process begin a trial; what it prints then."""
    assert process.stdin is not None
    process.stdin.write(f"{word}\n")
    process.stdin.flush()
    return hear(process)


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_parent_lives_until_it_leaves(folder):
    with joined(folder) as one_, joined(folder) as two:
        assert one_.id != two.id
        assert str(os.getpid()) in one_.id
        assert one_.others() == [two.id]
        assert two.alive(one_.id)
        assert one_.dead() == []
        (folder / "study.json").write_text("{}")
        left = two.id
    with joined(folder) as three:
        assert not three.alive(left)
        assert not three.alive("../../etc/passwd")
        assert three.others() == three.dead() == []


def test_a_study_that_never_began_leaves_no_folder(folder):
    with joined(folder) as first:
        with joined(folder):
            pass
        assert first.alive(first.id)
        assert folder.exists()  # the other one is in it still
    assert not folder.exists()
    with joined(folder):
        (folder / "precious").write_text("")
    assert (folder / "precious").exists()


def test_only_one_has_the_turn_and_the_same_may_go_in_twice(folder):
    inside: list[str] = []
    with joined(folder) as first, joined(folder) as second:

        def other() -> None:
            with second.exclusive():
                inside.append("second")

        with first.exclusive(), first.exclusive():
            thread = threading.Thread(target=other)
            thread.start()
            time.sleep(0.3)
            inside.append("first")
        thread.join(10)
    assert inside == ["first", "second"]


def test_a_folder_that_cannot_be_written_is_a_message(tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(DiskError), joined(tmp_path / "runs" / "books"):
        pass


def test_trials_of_a_killed_parent_are_taken_over_those_of_a_living_one_are_not(folder):
    dead, living = start(folder), start(folder)
    assert say(dead, "hang") == ["hanging", "0"]
    assert say(living, "hang") == ["hanging", "1"]
    with joined(folder) as parent:
        ledger = open_ledger(parent)
        assert ledger.elsewhere == {0, 1}
        kill(dead)
        ledger.refresh()
        assert ledger.elsewhere == {1}
        again = one(ledger)
        assert again.data["retry_of"] == 0
        assert again.params == Trial("books", ledger.path(0)).params
        assert Trial("books", ledger.path(0)).outcome == "interrupted"
        assert Trial("books", ledger.path(1)).outcome == "running"
        assert say(living, "on") == ["done", "1"]
        ledger.refresh()
        assert (ledger.judged, ledger.elsewhere) == (2, set())
        living.stdin.close()
        living.wait(30)
        living.stdout.close()
        assert_books_agree(ledger)
        assert parent.dead() == []


def test_what_a_parent_leaves_in_flight_is_taken_over_by_one_that_stays(folder):
    with joined(folder) as stays:
        ledger = open_ledger(stays)
        with joined(folder) as leaves:
            begin(open_ledger(leaves))
        ledger.refresh()
        assert one(ledger).data["retry_of"] == 0
        assert_books_agree(ledger)


@pytest.mark.parametrize("left", ["", '{"number": 0, "outc'])
def test_a_record_that_a_crash_of_the_machine_tore_is_begun_again(folder, left):
    with joined(folder) as stays:
        ledger = open_ledger(stays)
        with joined(folder) as leaves:
            begin(open_ledger(leaves))
        (ledger.path(0) / "trial.json").write_text(left)
        ledger.refresh()
        assert one(ledger).data["retry_of"] == 0
        assert Trial("books", ledger.path(0)).outcome == "interrupted"
        assert_books_agree(ledger)


def test_a_trial_that_was_asked_for_and_never_begun_is_taken_over(folder):
    """Ctrl-C between the storage's answer and the record, while another process runs."""
    with joined(folder) as stays:
        ledger = open_ledger(stays)
        with joined(folder) as leaves:
            storage.ask(open_ledger(leaves).optuna, SAMPLER, 0)
        ledger.refresh()
        assert one(ledger).data["retry_of"] == 0
        assert_books_agree(ledger)


def test_a_suspended_parent_is_not_taken_for_dead(folder):
    process = start(folder)
    say(process, "hang")
    process.send_signal(signal.SIGSTOP)
    with joined(folder) as parent:
        ledger = open_ledger(parent)
        ledger.refresh()
        assert ledger.elsewhere == {0}
        assert one(ledger).number == 1
        kill(process)
        ledger.refresh()
        assert one(ledger).data["retry_of"] == 0
        assert_books_agree(ledger)


def test_a_trial_of_its_own_that_was_asked_and_never_begun_is_run_again(folder):
    """Ctrl-C between the storage's answer and the record."""
    with joined(folder) as parent:
        ledger = open_ledger(parent)
        storage.ask(ledger.optuna, SAMPLER, 0)
        mine = begin(ledger)[1]
        ledger.reconcile()
        end(ledger, mine)
        assert one(ledger).data["retry_of"] == 0
        assert_books_agree(ledger)


def test_several_parents_share_the_suggestions_and_the_count(folder):
    processes = [start(folder) for _ in range(3)]
    for _ in range(4):
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("on\n")
            process.stdin.flush()
    done = [int(hear(process)[1]) for _ in range(4) for process in processes]
    assert sorted(done) == list(range(12))
    for process in processes:
        process.communicate()
    with joined(folder) as parent:
        ledger = open_ledger(parent)
        assert ledger.judged == 12
        assert_books_agree(ledger)


def test_records_of_others_are_counted_once(folder):
    with joined(folder) as first, joined(folder) as second:
        ours, theirs = open_ledger(first), open_ledger(second)
        for _ in range(3):
            done = one(theirs)
        for _ in range(2):
            ours.refresh()
        assert ours.judged == theirs.judged == 3
        assert ours.known == theirs.known
        (theirs.path(done.number) / "trial.json").write_text("{")  # damaged later: counted already
        ours.refresh()
        assert ours.judged == 3


@pytest.mark.slow
def test_parents_killed_at_any_moment_lose_and_double_nothing(folder):
    context = forking()
    moments = random.Random(0)
    pairs = 0
    while pairs < 10 or ended(folder) < 12:
        pairs += 1
        assert pairs < 100, "they come to nothing"
        pair = [context.Process(target=toil, args=(folder,)) for _ in range(2)]
        for process in pair:
            process.start()
        for process in pair:
            process.join(moments.uniform(0.2, 1.2))
            assert process.exitcode is None, "it ended by itself"
            process.kill()
            process.join()
    with joined(folder) as parent:
        ledger = open_ledger(parent)
        while storage_has_waiting(ledger):
            one(ledger)
        assert parent.dead() == []
        assert ledger.judged >= 12
        assert_books_agree(ledger)


def ended(folder: Path) -> int:
    return sum(trial.outcome == "complete" for trial in Study(folder).trials())


def storage_has_waiting(ledger: Ledger) -> bool:
    return any(trial.state.name == "WAITING" for trial in ledger.optuna.get_trials())


@pytest.mark.parametrize("left", ["study.json", "a study", "a study of its own"])
def test_a_start_that_was_killed_is_begun_again(folder, tmp_path, left, monkeypatch):
    """Between study.json, the study in the storage, and what ties the two together."""
    store = Store(f"sqlite:///{tmp_path / 'shared.db'}")
    real, attribute = optuna.create_study, optuna.Study.set_user_attr

    def killed(*arguments, **more):
        if left != "study.json":
            real(**more)
        raise SystemExit

    def tied(study, name, value):
        attribute(study, name, value)
        raise SystemExit

    with monkeypatch.context() as patch:
        if left == "a study of its own":
            patch.setattr(optuna.Study, "set_user_attr", tied)
        else:
            patch.setattr(optuna, "create_study", killed)
        with pytest.raises(SystemExit):
            try_to_open(folder, store)
    with joined(folder) as parent:
        ledger = open_ledger(parent, store)
        one(ledger)
        assert_books_agree(ledger)


def test_another_folder_does_not_share_a_study_of_the_same_name(folder, tmp_path):
    store = Store(f"sqlite:///{tmp_path / 'shared.db'}")
    with joined(folder) as parent:
        one(open_ledger(parent, store))
    other = tmp_path / "elsewhere" / "books"
    with pytest.raises(WorkbenchError, match="another study 'books'"), joined(other) as parent:
        open_ledger(parent, store)
    assert not other.exists()
    with joined(other) as parent:
        one(open_ledger(parent, store, name="other books"))


def test_a_study_goes_on_only_in_its_own_storage(folder, tmp_path):
    store = Store(f"sqlite:///{tmp_path / 'shared.db'}")
    with joined(folder) as parent:
        one(open_ledger(parent, store))
    before = (folder / "study.json").read_bytes()
    for wrong in (Store(), Store(f"sqlite:///{tmp_path / 'other.db'}")):
        with pytest.raises(WorkbenchError, match=r"keeps its trials in sqlite:.*shared\.db"):
            try_to_open(folder, wrong)
    assert (folder / "study.json").read_bytes() == before
    assert not (tmp_path / "other.db").exists()
    with joined(folder) as parent:
        assert open_ledger(parent, store).judged == 1
    (tmp_path / "shared.db").unlink()
    with pytest.raises(WorkbenchError, match="storage was lost"), joined(folder) as parent:
        open_ledger(parent, store)


def test_the_default_storage_may_be_named(folder):
    with joined(folder) as parent:
        one(open_ledger(parent))
    with joined(folder) as parent:
        assert open_ledger(parent, Store(default_url(folder))).judged == 1


def test_a_parent_that_cannot_lock_says_so(folder, monkeypatch):
    import fcntl

    def refuse(*arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(DiskError, match="No locks available"):
        Parent(folder)
