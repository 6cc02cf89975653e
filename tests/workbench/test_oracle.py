"""The oracle: all of a small space judged as a study judges, resumably, and compared with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.workbench.conftest import STUDY, make_config
from tests.workbench.studies import run
from workbench import WorkbenchError
from workbench.files import write_json
from workbench.oracle import Oracle, report
from workbench.records import Study, load_study, load_trial
from workbench.reporter import Reporter

SMALL = {
    "space.d_model": [8, 12],
    "space.num_layers": 1,
    "space.layers": {"toy": {"width": [1, 2]}},
    "rungs": {"at": [0.25, 0.5]},
    "constraints": {"toy_weights": {"max": 600}},
    "budget.trials": 3,
}  # 2 x (toy in 2 widths, other) layouts


def config(**changes):
    return make_config(STUDY, **{**SMALL, **changes})


@pytest.fixture(scope="module")
def tabulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with a study and its oracle."""
    runs = tmp_path_factory.mktemp("oracle") / "runs"
    run(STUDY, runs, **SMALL)
    Oracle(config(), runs).tabulate()
    return runs


@pytest.fixture
def runs(tabulated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tabulated, tmp_path / "runs"))


def records(runs: Path) -> dict[str, str]:
    return {str(p): p.read_text() for p in (runs / "toys" / "oracle").rglob("trial.json")}


def test_every_layout_is_judged_once_as_the_study_would(tabulated, tmp_path):
    oracle = Oracle(config(), tabulated)
    assert oracle.missing() == []
    truth = load_study("toys/oracle", tabulated)
    trials = truth.trials()
    assert [t.number for t in trials] == list(range(len(oracle.enumeration.layouts)))
    for trial, suggested in zip(trials, oracle.enumeration.layouts, strict=True):
        assert trial.layout == suggested.layout
        assert trial.params == suggested.params
        expected = "infeasible" if trial.metrics["toy_weights"] > 600 else "complete"
        assert trial.outcome == expected
        if expected == "complete":
            assert [rung["step"] for rung in trial.data["rungs"]] == [2, 4]
        assert not list(trial.path.glob("*.safetensors"))
    assert {t.outcome for t in trials} == {"complete", "infeasible"}
    # The same figures as a study that trains every one of them, to the bit.
    whole = run(STUDY, tmp_path, **{**SMALL, "rungs": {"at": []}, "budget.trials": 4})
    mine = {t.data["layout_hash"]: t.metrics for t in trials if t.outcome == "complete"}
    theirs = {t.data["layout_hash"]: t.metrics for t in whole.trials() if t.outcome == "complete"}
    assert len(theirs) == 4
    assert mine.items() >= theirs.items()
    assert load_trial("toys/oracle:0", tabulated).name == "toys/oracle:0"


def test_what_the_study_judged_is_not_judged_again(tabulated):
    study = Study(tabulated / "toys")
    done = {t.data["layout_hash"]: t for t in study.trials() if t.outcome == "complete"}
    truth = Study(tabulated / "toys" / "oracle").trials()
    taken = {t.data["layout_hash"]: t for t in truth if "taken_from" in t.data}
    assert done.keys() <= taken.keys()
    for layout, trial in done.items():
        assert taken[layout].data["taken_from"] == trial.name
        assert taken[layout].metrics == trial.metrics


def test_it_goes_on_where_it_was_stopped(runs):
    whole = records(runs)
    trials = runs / "toys" / "oracle" / "trials"
    truth = Study(trials.parent)
    free = [t for t in truth.trials() if "taken_from" not in t.data and t.outcome == "complete"]
    assert free
    lost = free[0].path
    (lost / "trial.json").unlink()
    (lost / "checkpoint.safetensors").write_bytes(b"half written")

    class Listener(Reporter):
        def __init__(self):
            self.heard = []

        def started(self, study, resumed, judged, goal):
            self.heard.append((resumed, judged, goal))

        def trial_finished(self, trial):
            self.heard.append(trial.name)

    listener = Listener()
    assert Oracle(config(), runs).missing() == [free[0].number]
    Oracle(config(), runs).tabulate(listener)
    assert listener.heard == [(True, len(whole) - 1, len(whole)), free[0].name]
    again = records(runs)
    assert again.keys() == whole.keys()
    for path, text in whole.items():
        if Path(path).parent != lost:
            assert again[path] == text
        else:
            assert json.loads(again[path])["metrics"] == json.loads(text)["metrics"]
    listener.heard.clear()
    Oracle(config(), runs).tabulate(listener)
    assert listener.heard == []


def test_ctrl_c_keeps_what_was_judged(tmp_path):
    class Impatient(Reporter):
        def trial_finished(self, trial):
            raise KeyboardInterrupt

    oracle = Oracle(config(), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        oracle.tabulate(Impatient())
    assert oracle.missing() == [1, 2, 3, 4, 5]
    truth = oracle.tabulate()
    assert oracle.missing() == []
    assert truth.front_trials()


def test_faults_of_a_layout_are_its_verdict_and_killed_workers_are_tried_again(tmp_path):
    changes = {
        "space.d_model": 8, "space.mixers": ["toy", "dies", "diverges"], "constraints": {},
        "runtime.executor": "process", "runtime.workers": 2, "budget.retries": 1,
    }  # fmt: skip
    oracle = Oracle(config(**changes), tmp_path)
    truth = oracle.tabulate()
    outcomes = {t.pattern: t.outcome for t in truth.trials()}
    assert outcomes == {"t": "complete", "k": "crashed", "n": "diverged"}
    killed = [t.number for t in truth.trials() if t.outcome == "crashed"]
    assert oracle.missing() == killed
    oracle.tabulate()
    assert Study(oracle.folder).trial(killed[0]).data["attempt"] == 1
    assert oracle.missing() == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"training.lr": 0.5}, "training.lr: 0.01 then, 0.5 now"),
        ({"space.d_model": [8, 12, 16]}, "was started differently"),
    ],
)
def test_figures_that_would_not_compare_are_refused(runs, change, words):
    before = records(runs)
    with pytest.raises(WorkbenchError, match=words):
        Oracle(config(**change), runs)
    (runs / "toys" / "study.json").unlink()  # a table made without a study
    with pytest.raises(WorkbenchError, match=words):
        Oracle(config(**change), runs)
    assert records(runs) == before


def test_a_space_too_large_leaves_nothing_behind(tmp_path):
    with pytest.raises(WorkbenchError, match="6 layouts, too many to judge each"):
        Oracle(config(), tmp_path, limit=5)
    assert not (tmp_path / "toys").exists()


def test_one_process_at_a_time(runs):
    from workbench.parents import joined

    with (
        joined(runs / "toys" / "oracle"),
        pytest.raises(WorkbenchError, match="another process judges"),
    ):
        Oracle(config(), runs).tabulate()


def test_what_killed_processes_left_is_cleared_away(runs):
    left = runs / "toys" / "oracle" / "parents" / "host-1-00"
    left.touch()
    Oracle(config(), runs).tabulate()
    assert not left.exists()


def made_up(path: Path, rows: list[tuple[str, str, float, float]]) -> Study:
    """A study of records alone: outcome, layout, and two objectives to minimize."""
    objectives = [{"name": name, "unit": "", "direction": "minimize"} for name in "ab"]
    facts = {"name": path.name, "objectives": objectives, "units": {"a": "", "b": ""}}
    write_json(path / "study.json", {**facts, "config": {}})
    for number, (outcome, layout, a, b) in enumerate(rows):
        record = {
            "outcome": outcome, "layout_hash": layout, "params": {}, "given_up": True,
            "metrics": {"a": a, "b": b} if outcome == "complete" else {},
            "rungs": [{"share": 0.25}] if outcome == "stopped" else [],
        }  # fmt: skip
        write_json(path / "trials" / f"{number:05d}" / "trial.json", record)
    return Study(path)


def test_a_search_against_the_truth(tmp_path):
    rows = [
        ("complete", "x", 0.0, 1.0), ("complete", "y", 1.0, 0.0), ("complete", "z", 0.5, 0.5),
        ("complete", "same", 0.0, 1.0), ("complete", "w", 2.0, 2.0), ("diverged", "n", 0.0, 0.0),
    ]  # fmt: skip
    truth = made_up(tmp_path / "truth", rows)
    search = made_up(
        tmp_path / "search",
        [
            ("complete", "w", 2.0, 2.0),
            ("infeasible", "q", 0.0, 0.0),
            ("stopped", "z", 0.0, 0.0),
            ("complete", "x", -9.0, -9.0),  # measured luckily: the truth's figures count
            ("duplicate", "x", 0.0, 1.0),
            ("diverged", "n", 0.0, 0.0),
            ("complete", "y", 1.0, 0.0),
        ],
    )
    found = report(search, truth)
    assert [(e.number, e.trainings) for e in found.evaluations] == [
        (0, 1.0), (2, 1.25), (3, 2.25), (5, 3.25), (6, 4.25),
    ]  # fmt: skip
    # Boxes below (1.1, 1.1): an end of the front 0.11; both 0.21; with the middle 0.21 + 0.25.
    expected = [1, 1, 1 - 0.11 / 0.46, 1 - 0.11 / 0.46, 1 - 0.21 / 0.46]
    assert [e.regret for e in found.evaluations] == pytest.approx(expected)
    assert [t.data["layout_hash"] for t in found.front] == ["x", "same", "z", "y"]
    assert [t.data["layout_hash"] for t in found.missed] == ["z"]  # `same` is as good as x
    assert found.outcomes == {"complete": 5, "diverged": 1}


def test_a_study_without_trials_has_no_regret(tmp_path):
    truth = made_up(tmp_path / "truth", [("complete", "x", 0.0, 1.0)])
    with pytest.raises(WorkbenchError, match="no trial of study 'search' is judged yet"):
        report(made_up(tmp_path / "search", []), truth)
    with pytest.raises(WorkbenchError, match="no layout of the space"):
        report(truth, made_up(tmp_path / "other", [("diverged", "x", 0.0, 1.0)]))
