"""Studies with several workers: nothing judged twice, nothing lost, whatever happens to one."""

from __future__ import annotations

import signal
from collections import Counter

import pytest

from tests.workbench.conftest import make_config
from tests.workbench.studies import assert_all_accounted_for, run, storage_trials
from tests.workbench.test_executors import gone
from tests.workbench.test_study_faults import slow, start_slow, stop, workers_of
from workbench.records import load_study
from workbench.study import Reporter, run_study

WORKERS = {"runtime.executor": "process", "runtime.workers": 3}


def test_workers_share_a_study_and_judge_no_layout_twice(study_data, runs):
    """Four layouts and three workers: suggestions repeat what is in flight, and wait for it."""
    heard: list[tuple[str, int]] = []

    class Listener(Reporter):
        def trial_started(self, number, pattern):
            heard.append(("started", number))

        def trial_finished(self, trial):
            heard.append(("finished", trial.number))

    space = {
        "d_model": [8, 12],
        "num_layers": 1,
        "mixers": ["slow", "other"],
        "placements": ["alternate"],
    }
    config = make_config(study_data, space=space, seed=1, **WORKERS)
    study = run_study(config, runs, Listener())
    assert_all_accounted_for(study)
    outcomes = Counter(trial.outcome for trial in study.trials())
    assert outcomes["complete"] == 4
    assert set(outcomes) == {"complete", "duplicate"}
    judged = [t.data["layout_hash"] for t in study.trials() if t.outcome == "complete"]
    assert len(set(judged)) == 4
    starts = [number for what, number in heard if what == "started"]
    assert len(starts) == len(set(starts)) == 4
    first_end = next(i for i, item in enumerate(heard) if item == ("finished", starts[0]))
    assert len([what for what, _ in heard[:first_end] if what == "started"]) > 1
    for trial in study.trials():
        if trial.outcome == "duplicate":
            assert trial.metrics == study.trial(trial.data["duplicate_of"]).metrics


def test_what_waits_for_a_crashing_trial_waits_for_its_retry(study_data, runs):
    """All suggestions are one layout, which kills its worker: two attempts, however many wait."""
    space = {"d_model": 8, "num_layers": 1, "mixers": ["dies"], "placements": ["alternate"]}
    changes = {**WORKERS, "budget": {"trials": 1, "retries": 1}, "space": space}
    study = run(study_data, runs, **changes)
    assert_all_accounted_for(study)
    crashed = [trial for trial in study.trials() if trial.outcome == "crashed"]
    assert [trial.data["given_up"] for trial in crashed] == [False, True]
    assert crashed[1].data["retry_of"] == crashed[0].number
    others = {trial.outcome for trial in study.trials()} - {"crashed"}
    assert others <= {"duplicate"}
    assert not list(study.path.rglob("checkpoint.safetensors"))


def test_two_workers_find_what_one_finds(study_data, tmp_path):
    """The figures of a layout do not depend on who judges it, or beside whom."""
    one = run(study_data, tmp_path / "a", **{"budget.trials": 6})
    two = run(study_data, tmp_path / "b", **{**WORKERS, "budget.trials": 6})
    assert sum(trial.outcome == "complete" for trial in two.trials()) == 6
    figures = {t.data["layout_hash"]: t.metrics for t in one.trials()}
    shared = [t for t in two.trials() if t.data["layout_hash"] in figures]
    assert shared
    assert all(trial.metrics == figures[trial.data["layout_hash"]] for trial in shared)


@pytest.mark.slow
def test_two_processes_share_a_study(study_data, tmp_path):
    """A second process joins; together they reach the goal once, and judge no layout twice."""
    data = slow(study_data)
    data["space"]["d_model"] = [8, 12, 16, 20, 24, 28]
    process = start_slow(data, tmp_path / "runs")
    try:
        study = run(data, tmp_path / "runs")
        process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0
    assert_all_accounted_for(study)
    complete = [trial for trial in study.trials() if trial.outcome == "complete"]
    assert len({trial.data["layout_hash"] for trial in complete}) == len(complete)
    assert len(complete) in (2, 3)  # both may begin what they take for the last one
    assert len({trial.data["parent"] for trial in complete}) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.slow
def test_a_stopped_study_runs_all_in_flight_again(study_data, tmp_path, number):
    data = slow(study_data)
    data["runtime"]["workers"] = 2
    data["space"]["d_model"] = [8, 12, 16, 24]
    process = start_slow(data, tmp_path / "runs")
    children = workers_of(process.pid)
    assert len(children) == 3  # two workers, and what they are forked from
    stop(process, number)
    assert gone(children), "an orphan worker"
    before = load_study("toys", tmp_path / "runs")
    in_flight = [t for t in before.trials() if t.outcome in ("interrupted", "running")]
    assert len(in_flight) >= 2  # one more if it waits for another of its layout
    resumed = run(data, tmp_path / "runs")
    assert_all_accounted_for(resumed)
    again = [t for t in resumed.trials() if t.data["retry_of"] is not None]
    assert len(again) >= 2
    assert {t.data["retry_of"] for t in again} <= {t.number for t in in_flight}
    for trial in again:
        assert trial.params == resumed.trial(trial.data["retry_of"]).params
        assert trial.outcome in ("complete", "duplicate")
    assert sum(trial.outcome == "complete" for trial in resumed.trials()) == 2
    assert {state.state.name for state in storage_trials(resumed)} <= {"COMPLETE", "FAIL"}
