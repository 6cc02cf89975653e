"""Studies: what they leave behind, repeat, resume, and tell while they run."""

from __future__ import annotations

import os

import pytest

from tests.workbench.conftest import TOYS, make_config
from tests.workbench.studies import assert_all_accounted_for, run, storage_trials
from workbench import WorkbenchError
from workbench.records import list_studies, load_study, load_trial
from workbench.study import Reporter, run_study


def test_a_study_leaves_whole_records(study_data, runs):
    study = run(study_data, runs)
    assert_all_accounted_for(study)
    complete = [trial for trial in study.trials() if trial.outcome == "complete"]
    assert len(complete) == 4
    for trial in complete:
        assert trial.layout.hash == trial.data["layout_hash"]
        assert set(trial.metrics) == {"toy_loss", "toy_weights", "toy_depth"}
        assert trial.data["extras"] == {"toy_depth.blocks": trial.metrics["toy_depth"]}
        curve = trial.curve()
        assert list(curve["step"]) == list(range(1, 9))
        assert curve["tokens"].iloc[-1] == 512
        assert trial.weights.exists()
        assert trial.environment["versions"]["torch"]
        assert set(trial.data["stage_seconds"]) == {
            "static", "measured", "training", "trained", "quantized",
        }  # fmt: skip
        assert not list(trial.path.glob("*.tmp"))
        assert not (trial.path / "checkpoint.safetensors").exists()
    front = study.front()
    assert set(front.index) <= {trial.number for trial in complete}
    assert load_trial("toys:0", runs).number == 0
    assert [s.name for s in list_studies(runs)] == ["toys"]


@pytest.mark.slow
def test_same_seed_same_suggestions_and_losses(study_data, tmp_path):
    one = run(study_data, tmp_path / "a", **{"budget.trials": 12})
    two = run(study_data, tmp_path / "b", **{"budget.trials": 12})
    other = run(study_data, tmp_path / "c", seed=1)
    assert [t.params for t in one.trials()] == [t.params for t in two.trials()]
    assert [t.metrics for t in one.trials()] == [t.metrics for t in two.trials()]
    assert [t.params for t in one.trials()][:4] != [t.params for t in other.trials()][:4]


def test_a_worker_process_finds_what_this_process_finds(study_data, tmp_path):
    here = run(study_data, tmp_path / "a")
    there = run(study_data, tmp_path / "b", **{"runtime.executor": "process"})
    assert [t.metrics for t in here.trials()] == [t.metrics for t in there.trials()]


def test_resuming_goes_on_where_an_unbroken_study_would(study_data, tmp_path):
    whole = run(study_data, tmp_path / "a", **{"budget.trials": 6})
    run(study_data, tmp_path / "b", **{"budget.trials": 3})
    resumed = run(study_data, tmp_path / "b", **{"budget.trials": 6})
    assert [t.params for t in whole.trials()] == [t.params for t in resumed.trials()]
    assert [t.metrics for t in whole.trials()] == [t.metrics for t in resumed.trials()]


def test_resume_is_told_and_a_finished_study_does_nothing(study_data, runs):
    heard = []

    class Listener(Reporter):
        def started(self, study, resumed, judged, goal):
            heard.append((resumed, judged, goal))

    run_study(make_config(study_data), runs, Listener())
    count = len(load_study("toys", runs).trials())
    run_study(make_config(study_data), runs, Listener())
    assert heard == [(False, 0, 4), (True, 4, 4)]
    assert len(load_study("toys", runs).trials()) == count


def test_a_reporter_hears_of_every_phase(study_data, runs):
    heard = []

    class Listener(Reporter):
        def trial_started(self, number, pattern):
            heard.append((number, pattern))

        def trial_phase(self, number, phase):
            heard.append(phase)

        def trial_progress(self, number, step, steps, loss):
            heard.append((step, steps))

    study = run_study(make_config(study_data, **{"budget.trials": 1}), runs, Listener())
    steps = [(step, 8) for step in range(1, 9)]
    start = (0, study.trial(0).pattern)
    training = ["building", "training", *steps, "evaluating"]
    assert heard == [start, "building", "measuring", *training]
    heard.clear()
    still = make_config(
        study_data,
        name="still",
        report=[],
        **{"budget.trials": 1, "runtime.executor": "process", "space.quantizers": ["int8"]},
    )
    run_study(still, runs, Listener())
    assert heard[1:] == [*training, "quantizing", "evaluating"]


def test_duplicates_reuse_figures_and_are_not_trained(study_data, runs):
    study = run(study_data, runs, **{"space.layers": {}, "budget.trials": 7})
    duplicates = [trial for trial in study.trials() if trial.outcome == "duplicate"]
    assert duplicates
    for trial in duplicates:
        original = study.trial(trial.data["duplicate_of"])
        assert trial.metrics == original.metrics
        assert trial.data["layout_hash"] == original.data["layout_hash"]
        assert not (trial.path / "model.safetensors").exists()
        with pytest.raises(WorkbenchError, match=f"toys:{original.number}"):
            _ = trial.weights
    judged = [t.data["layout_hash"] for t in study.trials() if t.outcome == "complete"]
    assert len(judged) == len(set(judged)) == 7
    assert_all_accounted_for(study)


def test_an_exhausted_space_says_so_and_keeps_its_records(study_data, runs):
    with pytest.raises(WorkbenchError, match="exhausted"):
        run(study_data, runs, **{"space.d_model": 8, "space.num_layers": 1, "space.layers": {}})
    study = load_study("toys", runs)
    assert {t.outcome for t in study.trials()} == {"complete", "duplicate"}
    assert_all_accounted_for(study)


def test_constraints_reject_before_training(study_data, runs):
    study = run(
        study_data, runs, **{"constraints": {"toy_weights": {"max": 1000}}, "budget.trials": 6}
    )
    rejected = [t for t in study.trials() if t.outcome == "infeasible"]
    assert rejected
    for trial in rejected:
        assert trial.metrics["toy_weights"] > 1000
        assert "toy_weights" in trial.reason
        assert trial.data["constraints"]["toy_weights"] == trial.metrics["toy_weights"] - 1000
        assert "training" not in trial.data["stage_seconds"]
    assert all(t.metrics["toy_weights"] <= 1000 for t in study.front_trials())
    for frozen in storage_trials(study):
        if frozen.state.name == "PRUNED":
            assert frozen.constraints["toy_weights"] > 0
    assert_all_accounted_for(study)


def test_a_constraint_on_a_trained_metric_counts_what_it_cost(study_data, runs):
    changes = {"constraints": {"toy_loss": {"max": 0.001}}, "budget.trials": 3}
    study = run(study_data, runs, **changes)
    trained = [t for t in study.trials() if "training" in t.data["stage_seconds"]]
    assert len(trained) == len({t.data["layout_hash"] for t in trained}) == 3
    assert {t.outcome for t in trained} == {"infeasible"}
    assert_all_accounted_for(study)


def test_modules_in_the_users_folder_do_not_shadow_ours(study_data, runs, tmp_path, monkeypatch):
    (tmp_path / "safetensors.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    study = run(study_data, runs, **{"runtime.executor": "process", "budget.trials": 1})
    assert study.trial(0).outcome == "complete"


def test_a_metric_that_refuses_is_a_recorded_outcome(study_data, runs):
    study = run(study_data, runs, report=["toy_absent"], **{"budget.trials": 1})
    assert study.trial(0).outcome == "error"
    assert study.trial(0).reason == "this device has no such counter"


def test_what_a_plugin_prints_goes_to_the_trials_log(study_data, runs, capfd):
    study = run(
        study_data,
        runs,
        **{"space.mixers": ["prints"], "space.layers": {}, "runtime.executor": "process"},
    )
    assert capfd.readouterr().out == ""
    for trial in study.trials():
        if trial.outcome == "complete":
            assert "a plugin that prints" in (trial.path / "log.txt").read_text()


def test_another_sampler_by_import_string(study_data, runs):
    sampler = {"class": "optuna.samplers.NSGAIISampler", "population_size": 4}
    study = run(study_data, runs, sampler=sampler, **{"budget.trials": 6})
    assert sum(t.outcome == "complete" for t in study.trials()) == 6


def test_records_refuse_what_is_not_there(study_data, runs):
    run(study_data, runs, **{"budget.trials": 1})
    with pytest.raises(WorkbenchError, match="Did you mean 'toys'"):
        load_study("toy", runs)
    with pytest.raises(WorkbenchError, match="no trial 99"):
        load_trial("toys:99", runs)
    with pytest.raises(WorkbenchError, match="STUDY:NUMBER"):
        load_trial("toys", runs)


def test_plugin_folders_reach_the_worker(study_data, runs):
    assert str(TOYS) in study_data["plugin_dirs"]
    study = run(study_data, runs, **{"runtime.executor": "process", "budget.trials": 1})
    assert study.trial(0).outcome == "complete"
    assert os.path.isabs(study.data["plugins"]["toys"]["file"])
