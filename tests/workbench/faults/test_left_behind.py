"""What a killed process was writing is removed once its trial is settled."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from tests.workbench.ledgers import SAMPLER, begin, end, forking, open_ledger
from workbench import storage
from workbench.parents import joined


def leave(path: Path, name: str) -> Path:
    """A file as `files.replacing` leaves it when its process is killed in the middle."""
    path.mkdir(parents=True, exist_ok=True)
    file = path / f".{name}.4194304.tmp"
    file.write_text("half")
    return file


@pytest.mark.parametrize(
    ("outcome", "attempt", "goes_on"),
    [
        ("complete", 0, False),
        ("interrupted", 0, True),
        ("crashed", 0, True),
        ("crashed", 2, False),
    ],
)
def test_a_settled_trial_keeps_its_checkpoint_only_to_go_on(tmp_path, outcome, attempt, goes_on):
    with joined(tmp_path / "books") as parent:
        ledger = open_ledger(parent)
        _, record = begin(ledger)
        record["attempt"] = attempt
        folder = ledger.path(record["number"])
        half = leave(folder, "model.safetensors")
        checkpoint = folder / "checkpoint.safetensors"
        checkpoint.write_text("whole")
        end(ledger, record, outcome)
        assert not half.exists()
        assert checkpoint.exists() == goes_on
        waiting = [t for t in ledger.optuna.get_trials() if t.state.name == "WAITING"]
        assert bool(waiting) == goes_on


def asked_and_dropped(folder: Path) -> None:
    """A parent that ends between asking for a trial and knowing its parameters."""
    with joined(folder) as parent:
        ledger = open_ledger(parent)
        ledger.start(storage.ask(ledger.optuna, SAMPLER, 0))


def test_a_run_again_that_is_cut_short_twice_keeps_parameters_and_checkpoint(tmp_path):
    folder = tmp_path / "books"
    with joined(folder) as parent:
        ledger = open_ledger(parent)
        _, first = begin(ledger)
        (ledger.path(0) / "checkpoint.safetensors").write_text("whole")
        end(ledger, first, "interrupted")
    for _ in range(2):
        asked_and_dropped(folder)
    with joined(folder) as parent:
        ledger = open_ledger(parent)
        _, record = begin(ledger)
        assert record["retry_of"] == 2
        assert record["params"] == first["params"]
        ledger.take_checkpoint(record)
        assert (ledger.path(3) / "checkpoint.safetensors").read_text() == "whole"
        end(ledger, record)
    assert not list(folder.rglob("checkpoint.safetensors"))


def test_a_checkpoint_that_nobody_took_ends_with_the_last_attempt(tmp_path):
    with joined(tmp_path / "books") as parent:
        ledger = open_ledger(parent)
        _, first = begin(ledger)
        (ledger.path(0) / "checkpoint.safetensors").write_text("whole")
        end(ledger, first, "crashed")
        _, second = begin(ledger)
        assert second["retry_of"] == 0
        end(ledger, second)
        assert not list(ledger.folder.rglob("checkpoint.safetensors"))


def die_writing(folder: Path) -> None:
    with joined(folder) as parent:
        ledger = open_ledger(parent)
        _, record = begin(ledger)
        for path, name in (
            (folder, "study.json"),
            (folder / "layouts", record["layout_hash"]),
            (ledger.path(record["number"]), "trial.json"),
        ):
            leave(path, name)
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_next_start_removes_what_a_killed_parent_was_writing(tmp_path):
    folder = tmp_path / "books"
    process: multiprocessing.process.BaseProcess = forking().Process(
        target=die_writing, args=(folder,)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list(folder.rglob("*.tmp"))) == 3
    with joined(folder) as parent:
        open_ledger(parent)
    assert list(folder.rglob("*.tmp")) == []
