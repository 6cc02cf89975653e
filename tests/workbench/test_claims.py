"""Claims: of two processes that find one layout, one trains it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.workbench.ledgers import begin, end, forking, open_ledger, take_all
from workbench.claims import Claims
from workbench.errors import WorkbenchError
from workbench.parents import joined


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "books"


def test_a_claim_is_kept_as_long_as_its_trial_holds_it(folder):
    holding = {1}
    with joined(folder) as parent:
        claims = Claims(folder, parent, holding.__contains__)
        assert claims.holder("abc") is None
        assert claims.take("abc", 1) is None
        assert claims.take("abc", 2) == 1
        assert claims.take("abc", 1) is None  # its own
        assert claims.take("abd", 2) is None
        holding.clear()
        assert claims.take("abc", 3) is None
        assert claims.holder("abc") == 3


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "1.5"])
def test_a_claim_that_was_damaged_says_what_to_do(folder, content):
    with joined(folder) as parent:
        claims = Claims(folder, parent, lambda number: True)
        claims.take("abc", 1)
        (folder / "layouts" / "abc").write_text(content)
        with pytest.raises(WorkbenchError, match=r"layouts/abc.*remove it while no process"):
            claims.take("abc", 2)


def test_two_processes_never_hold_one_layout(folder):
    context = forking()
    results = context.Queue()
    folder.mkdir()
    (folder / "study.json").write_text("{}")
    processes = [
        context.Process(target=take_all, args=(folder, first, results)) for first in (0, 100, 200)
    ]
    for process in processes:
        process.start()
    taken = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(number for numbers in taken for number in numbers) == list(range(40))


def test_layouts_in_flight_and_judged_are_held_those_that_run_again_are_not(folder):
    with joined(folder) as first, joined(folder) as second:
        ours, theirs = open_ledger(first), open_ledger(second)
        _, record = begin(theirs)
        name = record["layout_hash"]
        assert theirs.claims.take(name, 0) is None
        assert ours.claims.take(name, 7) == 0  # in flight elsewhere
        assert theirs.claims.take(name, 8) == 0  # in flight here
        end(theirs, record, "interrupted")
        _, again = begin(ours)
        assert again["retry_of"] == 0
        assert again["layout_hash"] == name
        assert ours.claims.take(name, again["number"]) is None  # taken over
        assert theirs.claims.take(name, 9) == again["number"]
        end(ours, again)
        assert theirs.claims.take(name, 9) == again["number"]  # judged
        theirs.refresh()
        assert theirs.duplicate({"layout_hash": name}).metrics == {
            "loss": again["params"]["x"],
            "speed": 1 / (1 + again["params"]["x"]),
        }


def test_a_dead_parents_claim_is_free(folder):
    with joined(folder) as stays:
        ours = open_ledger(stays)
        with joined(folder) as leaves:
            theirs = open_ledger(leaves)
            _, record = begin(theirs)
            theirs.claims.take(record["layout_hash"], 0)
            assert ours.claims.take(record["layout_hash"], 5) == 0
        assert ours.claims.take(record["layout_hash"], 5) is None
