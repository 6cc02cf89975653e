"""Books of toy studies: trials asked, recorded and told without any model.

As a script (`python -m tests.workbench.ledgers URL FOLDER TRIALS`) it is a parent of its own: it
prints each trial that it has finished, waits for a line of input before the next (and ends where
there is none), and hangs in the middle of a trial when the line says so.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import optuna

from workbench import storage
from workbench.claims import Claims
from workbench.ledger import Ledger, study_facts
from workbench.parents import Parent, joined
from workbench.records import Objective, Trial
from workbench.storage_url import Store
from workbench.verdict import Verdict

OBJECTIVES = tuple(
    Objective(name=name, unit="", direction=direction)
    for name, direction in (("loss", "minimize"), ("speed", "maximize"))
)
SAMPLER = {"class": "optuna.samplers.RandomSampler"}


def open_ledger(
    parent: Parent,
    store: Store = storage.DEFAULT,
    notice: Callable[[str], None] = print,
    name: str = "books",
) -> Ledger:
    ledger = Ledger(parent.folder, OBJECTIVES, 2, parent=parent, store=store, notice=notice)
    ledger.open(name, {**study_facts(OBJECTIVES, {}), "config": {}})
    return ledger


def try_to_open(folder: Path, store: Store = storage.DEFAULT) -> None:
    """Open the books and close them."""
    with joined(folder) as parent:
        open_ledger(parent, store)


def begin(ledger: Ledger) -> tuple[optuna.Trial, dict[str, Any]]:
    """Ask for a trial and record it as far as it is known before it is judged."""
    trial = storage.ask(ledger.optuna, SAMPLER, 0, ledger.stale)
    record = ledger.start(trial)
    with storage.suggesting(ledger.optuna):
        trial.suggest_float("x", 0.0, 1.0)
    record["params"] = dict(trial.params)
    record["layout_hash"] = f"{trial.params['x']:.12f}"
    ledger.write(record)
    return trial, record


def end(ledger: Ledger, record: dict[str, Any], outcome: str = "complete") -> Trial:
    x = record["params"]["x"]
    metrics = {"loss": x, "speed": 1 / (1 + x)} if outcome == "complete" else {}
    constraints = {"loss": x - 2}
    seconds = {"training": 1.0}
    return ledger.finish(
        record,
        Verdict(outcome=outcome, metrics=metrics, constraints=constraints, stage_seconds=seconds),
    )


def one(ledger: Ledger) -> Trial:
    return end(ledger, begin(ledger)[1])


def assert_books_agree(ledger: Ledger) -> None:
    """Records and storage hold the same trials; none is unfinished, none is there twice."""
    trials = ledger.optuna.get_trials(deepcopy=False)
    asked = [trial for trial in trials if trial.state.name != "WAITING"]
    records = {path.name for path in (ledger.folder / "trials").iterdir()}
    assert records == {f"{trial.number:05d}" for trial in asked}
    assert [trial.number for trial in trials] == list(range(len(trials)))
    suggestions = [t.user_attrs["suggestion"] for t in asked if "retry_of" not in t.user_attrs]
    assert suggestions == list(range(len(suggestions)))
    for frozen in asked:
        trial = Trial("books", ledger.path(frozen.number))
        assert frozen.state.name == {"complete": "COMPLETE", "interrupted": "FAIL"}[trial.outcome]
        assert frozen.params == trial.params
        if trial.outcome == "complete":
            assert frozen.values == [trial.metrics["loss"], trial.metrics["speed"]]
    hashes = [t.params["x"] for t in asked if t.state.name == "COMPLETE"]
    assert len(set(hashes)) == len(hashes)


def forking() -> ForkServerContext:
    """Starts processes out of one that has imported what they need, and has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def toil(folder: Path) -> None:
    """Judge trials until killed."""
    with joined(folder) as parent:
        ledger = open_ledger(parent, notice=str)
        while True:
            _, record = begin(ledger)
            assert ledger.claims.take(record["layout_hash"], record["number"]) is None
            end(ledger, record)


def take_all(folder: Path, first: int, results: multiprocessing.Queue[list[int]]) -> None:
    """Claim forty layouts; answers which were to be had."""
    with joined(folder) as parent:
        claims = Claims(folder, parent, lambda number: True)
        results.put([n for n in range(40) if claims.take(f"{n:012x}", first + n) is None])


def main() -> None:
    url, folder, trials = sys.argv[1:]
    with joined(Path(folder)) as parent:
        store = Store(None if url == "default" else url, 30.0)
        ledger = open_ledger(parent, store, lambda message: print("notice", message, flush=True))
        print("open", parent.id, flush=True)
        for _ in range(int(trials)):
            word = sys.stdin.readline().strip()
            if not word:
                break
            _, record = begin(ledger)
            if word == "hang":
                print("hanging", record["number"], flush=True)
                sys.stdin.readline()
            print("done", end(ledger, record).number, flush=True)


if __name__ == "__main__":
    main()
