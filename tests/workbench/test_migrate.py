"""Migration: what an old study found, in a new one whose space is larger; nothing half-made."""

from __future__ import annotations

import contextlib
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workbench.conftest import STUDY, TOYS, make_config
from tests.workbench.studies import assert_all_accounted_for, run, storage_trials
from workbench import WorkbenchError
from workbench.builder import default_builder
from workbench.layout import Layout
from workbench.migrate import migrate
from workbench.records import Study
from workbench.replay import Replay, replayed
from workbench.space import Space
from workbench.study import run_study

GROWN = {
    "name": "grown",
    "space.d_model": [8, 12, 16, 20],
    "space.mixers": ["toy", "other", "full"],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with a finished study of every common outcome."""
    runs = tmp_path_factory.mktemp("migrate") / "runs"
    run(STUDY, runs, **old())
    return runs


def old(**changes):
    return {"budget.trials": 5, "constraints": {"toy_weights": {"max": 1500}}, **changes}


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "runs"))


def grown(**changes):
    changes = {**old(), **GROWN, **changes}
    return make_config(STUDY, **changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_finished_trials_go_on_in_a_larger_space(runs):
    before = contents(runs / "toys")
    source = Study(runs / "toys")
    done = migrate("toys", grown(), runs)
    assert contents(runs / "toys") == before
    assert done.study.name == "grown"
    assert done.study.data["migrated_from"] == "toys"
    assert len(done.numbers) >= 5
    told = storage_trials(done.study)
    told_before = storage_trials(source)
    for number, copied in done.numbers.items():
        trial, original = done.study.trial(copied), source.trial(number)
        assert trial.data["migrated_from"] == f"toys:{number}"
        assert trial.layout == original.layout
        assert trial.metrics == original.metrics
        assert trial.outcome == original.outcome
        assert (told[copied].state, told[copied].values, told[copied].constraints) == (
            told_before[number].state,
            told_before[number].values,
            told_before[number].constraints,
        )
        if original.outcome == "complete":
            assert trial.weights.samefile(original.weights)
            assert trial.curve().equals(original.curve())
    assert_all_accounted_for(done.study)
    judged = {t.data["layout_hash"] for t in done.study.trials() if t.outcome == "complete"}
    went_on = run(STUDY, runs, **{**old(), **GROWN, "budget.trials": 7})
    assert_all_accounted_for(went_on)
    new = [t for t in went_on.trials() if "migrated_from" not in t.data]
    assert len([t for t in went_on.trials() if t.outcome == "complete"]) == 7
    assert not {t.data["layout_hash"] for t in new if t.outcome == "complete"} & judged
    assert went_on.front_trials()


def test_a_parameter_that_was_fixed_gets_the_value_that_it_had(runs):
    run(STUDY, runs, **{"name": "fixed", "space.d_model": 12, "budget.trials": 2})
    config = make_config(
        STUDY, **{"name": "free", "space.d_model": {"low": 8, "high": 24, "step": 4}}
    )
    done = migrate("fixed", config, runs)
    assert {trial.params["d_model"] for trial in done.study.trials()} == {12}
    assert all(t.params["d_model"] == 12 for t in storage_trials(done.study))


def test_what_the_new_space_cannot_suggest_is_left_out_and_counted(runs):
    source = Study(runs / "toys")
    trials = [t for t in source.trials() if t.outcome != "interrupted"]
    *kept, lost = sorted({t.params["d_model"] for t in trials if t.outcome == "complete"})
    done = migrate("toys", grown(**{"space.d_model": [*kept, 24]}), runs)
    assert set(done.numbers) == {t.number for t in trials if t.params["d_model"] in kept}
    reason = f"d_model = {lost} is not in the new space"
    assert done.left_out[reason] == sum(t.params["d_model"] == lost for t in trials)
    assert_all_accounted_for(done.study)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"training.lr": 0.5}, r"training\.lr: \S+ then, 0\.5 now\n(?!.*training: )"),
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"objectives": ["toy_loss"]}, "objectives"),
        ({"constraints": {}}, "constraints"),
        ({"data.vocab_size": 8}, "data"),
        ({"name": "toys"}, "there is a study 'toys' in .* already"),
        ({"space.d_model": [40, 48]}, "no trial of study 'toys' fits the new space.*d_model"),
        ({"space.mixers": ["toy", "nothing"]}, "nothing"),
        ({"runtime.storage": "sqlite:////no/such/folder/x.db"}, "cannot open the storage"),
    ],
)
def test_refusals_leave_nothing_behind(runs, change, words):
    before = contents(runs)
    with pytest.raises(WorkbenchError, match=f"(?s){words}"):
        migrate("toys", grown(**change), runs)
    assert contents(runs) == before
    assert [path.name for path in runs.iterdir() if "grown" in path.name] == []


def test_an_unknown_old_study_is_named(runs):
    with pytest.raises(WorkbenchError, match="Did you mean 'toys'"):
        migrate("toy", grown(), runs)


def test_a_migration_that_breaks_off_leaves_no_study(runs, tmp_path, monkeypatch):
    """Neither in the folder nor in a storage of its own; the same call then works."""
    import workbench.migrate as module

    url = f"sqlite:///{tmp_path / 'shared.db'}"
    real = module._told

    def fails(copy, record):
        if record["number"] == 2:
            raise OSError(28, "No space left on device")
        return real(copy, record)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_told", fails)
        with pytest.raises(WorkbenchError, match="No space left"):
            migrate("toys", grown(), runs, url)
    assert not list(runs.glob("*grown*"))
    done = migrate("toys", grown(), runs, url)
    assert len(done.numbers) >= 5


def test_a_migration_that_was_killed_is_begun_again(runs, tmp_path, monkeypatch):
    """What it left in the storage goes; another study of the name stays."""
    import workbench.migrate as module

    url = f"sqlite:///{tmp_path / 'shared.db'}"
    with monkeypatch.context() as patch:
        patch.setattr(module, "_undone", lambda ledger, store: contextlib.nullcontext())
        patch.setattr(module, "_told", lambda copy, record: sys.exit("killed"))
        with pytest.raises(SystemExit):
            migrate("toys", grown(), runs, url)
    done = migrate("toys", grown(), runs, url)
    shutil.move(done.study.path, tmp_path / "elsewhere")
    with pytest.raises(WorkbenchError, match="holds another study 'grown'"):
        migrate("toys", grown(), runs, url)
    shutil.move(tmp_path / "elsewhere", done.study.path)
    config = grown(**{"budget.trials": 6})
    assert len(run_study(config, runs, None, url).trials()) > len(done.numbers)


class Drawn:
    """Draws what a space asks for out of given numbers."""

    def __init__(self, numbers):
        self.numbers = iter(numbers)
        self.params = {}

    def suggest_categorical(self, name, choices):
        return self.params.setdefault(name, choices[next(self.numbers) % len(choices)])

    def suggest_int(self, name, low, high, *, step=1, log=False):
        return self.params.setdefault(
            name, low + step * (next(self.numbers) % ((high - low) // step + 1))
        )


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=20, max_size=20))
def test_every_suggestion_of_a_space_is_found_again_in_a_larger_one(numbers):
    builder = default_builder((str(TOYS),))
    small = Space(make_config(STUDY).space, builder, 16)
    large = Space(grown().space, builder, 16)
    drawn = Drawn(numbers)
    layout: Layout = small.suggest(drawn)
    known: dict[str, object] = {}
    found, reason = replayed(large, layout, drawn.params, known)
    assert reason == ""
    assert isinstance(found, Replay)
    assert large.suggest(Replay(found.params)) == layout
    back, _ = replayed(small, layout, found.params, known)
    assert back is not None
    assert back.params == drawn.params
