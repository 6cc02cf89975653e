"""Studies: run, resume, repeat, and survive what trials and users do to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest

from tests.workbench.conftest import TOYS, make_config
from workbench import WorkbenchError
from workbench.records import Study, list_studies, load_study, load_trial
from workbench.study import Reporter, run_study

TIMEOUT = 6.0  # of the hanging layer: an age for a toy trial, little for a test


def run(base, runs, /, **changes):
    return run_study(make_config(base, **changes), runs)


def storage_trials(study: Study) -> list[optuna.trial.FrozenTrial]:
    url = f"sqlite:///{study.path / 'optuna.db'}"
    return optuna.load_study(study_name=study.name, storage=url).get_trials()


def assert_all_accounted_for(study: Study) -> None:
    """Every trial that Optuna knows has a record that agrees with it, and none is left running."""
    trials = {trial.number: trial for trial in study.trials()}
    states = {
        "complete": "COMPLETE", "infeasible": "PRUNED", "diverged": "FAIL", "error": "FAIL",
        "crashed": "FAIL", "timeout": "FAIL", "out_of_memory": "FAIL", "interrupted": "FAIL",
    }  # fmt: skip
    for frozen in storage_trials(study):
        if frozen.state.name == "WAITING":
            continue
        record = trials.pop(frozen.number)
        outcome = record.data.get("duplicate_outcome") or record.outcome
        assert frozen.state.name == states[outcome]
        assert record.params == frozen.params
        if frozen.state.name == "COMPLETE":
            names = [objective.name for objective in study.objectives]
            assert frozen.values == [record.metrics[name] for name in names]
    assert trials == {}


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
    assert heard == [start, "measuring", "training", *steps, "validating"]
    heard.clear()
    run_study(
        make_config(study_data, name="still", report=[], **{"budget.trials": 1}), runs, Listener()
    )
    assert heard[1:3] == ["building", "training"]


def test_forgotten_plugin_folders_are_named(study_data, runs, tmp_path):
    folder = tmp_path / "my plugins"
    folder.mkdir()
    (folder / "toys.py").write_text((TOYS / "toys.py").read_text())
    study_data["plugin_dirs"] = [str(folder)]
    run(study_data, runs, **{"budget.trials": 1})
    before = (runs / "toys" / "study.json").read_text()
    with pytest.raises(WorkbenchError) as caught:
        run(study_data, runs, plugin_dirs=[])
    assert f"made with the plugins of {folder}: add --plugin-dir '{folder}'." in str(caught.value)
    assert (runs / "toys" / "study.json").read_text() == before
    with pytest.raises(WorkbenchError) as caught:  # a study that was never made has forgotten none
        run(study_data, runs, plugin_dirs=[], name="other")
    assert "--plugin-dir" not in str(caught.value)


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


@pytest.mark.parametrize(
    ("layer", "outcome", "words"),
    [
        ("diverges", "diverged", "step 1"),
        ("raises", "error", "planted fault"),
        ("starves", "out_of_memory", "allocation"),
        ("dies", "crashed", "SIGKILL"),
        ("hangs", "timeout", f"longer than {TIMEOUT:g} s"),
    ],
)
def test_a_bad_layer_is_a_recorded_outcome(study_data, runs, layer, outcome, words):
    study = run(
        study_data,
        runs,
        **{
            "space": {
                "d_model": [8, 12, 16],
                "num_layers": 1,
                "mixers": [layer, "other"],
                "placements": ["alternate"],
            },
            "runtime.executor": "process",
            "budget": {"trials": 5, "trial_timeout": TIMEOUT, "retries": 1},
        },
    )
    assert_all_accounted_for(study)
    bad = [t for t in study.trials() if t.outcome == outcome]
    assert bad
    assert all(words in t.reason for t in bad)
    assert all(t.pattern for t in bad)
    good = [t for t in study.trials() if t.outcome == "complete"]
    assert good
    assert all(t.pattern == "o" for t in good)
    if outcome == "error":
        assert "planted fault" in (bad[0].path / "log.txt").read_text()
    if outcome == "crashed":
        again = [t for t in bad if t.data["retry_of"] is not None]
        assert again
        assert all(study.trial(t.data["retry_of"]).params == t.params for t in again)
        assert all(t.data["given_up"] == (t.data["retry_of"] is not None) for t in bad)
    judged = [t for t in study.trials() if t.outcome not in ("duplicate", "infeasible")]
    assert sum(t.data.get("given_up", True) for t in judged) == 5  # the budget, whole
    if outcome in ("crashed", "timeout"):
        assert all(t.environment["versions"]["torch"] for t in bad)
    assert not list(study.path.rglob("checkpoint.safetensors"))


def test_interrupts_never_use_up_a_trial(study_data, runs, monkeypatch):
    """However often the user stops a trial, it is queued again."""
    from workbench.executors import InlineExecutor

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(InlineExecutor, "judge", stop)
        for _ in range(4):
            with pytest.raises(KeyboardInterrupt):
                run(study_data, runs, **{"budget.retries": 0, "budget.trials": 1})
    study = run(study_data, runs, **{"budget.retries": 0, "budget.trials": 1})
    assert [t.outcome for t in study.trials()] == ["interrupted"] * 4 + ["complete"]
    assert len({json.dumps(t.params) for t in study.trials()}) == 1
    assert_all_accounted_for(study)


def test_a_constraint_on_a_trained_metric_counts_what_it_cost(study_data, runs):
    changes = {"constraints": {"toy_loss": {"max": 0.001}}, "budget.trials": 3}
    study = run(study_data, runs, **changes)
    trained = [t for t in study.trials() if "training" in t.data["stage_seconds"]]
    assert len(trained) == len({t.data["layout_hash"] for t in trained}) == 3
    assert {t.outcome for t in trained} == {"infeasible"}
    assert_all_accounted_for(study)


def test_a_lost_storage_is_refused(study_data, runs):
    study = run(study_data, runs, **{"budget.trials": 2})
    (study.path / "optuna.db").unlink()
    with pytest.raises(WorkbenchError, match="storage was lost"):
        run(study_data, runs)
    assert len(load_study("toys", runs).trials()) == len(study.trials())


def test_an_edited_plugin_file_is_another_study(study_data, runs, tmp_path):
    folder = tmp_path / "plugins"
    folder.mkdir()
    source = (TOYS / "toys.py").read_text()
    (folder / "toys.py").write_text(source)
    study_data["plugin_dirs"] = [str(folder)]
    run(study_data, runs, **{"budget.trials": 1})
    (folder / "toys.py").write_text(source.replace("torch.relu", "torch.tanh"))
    from workbench.builder import default_builder

    default_builder.cache_clear()
    with pytest.raises(WorkbenchError, match=r"plugins\.toys"):
        run(study_data, runs)


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


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"space.d_model": [8, 12]}, "space.d_model"),
        ({"space.mixers": ["toy", "full"]}, "space.mixers"),
        ({"training.lr": 0.5}, "training.lr"),
        ({"data.vocab_size": 8}, "vocab_size"),
        ({"seed": 1}, "seed"),
        ({"objectives": ["toy_loss"]}, "objectives"),
        ({"constraints": {"toy_weights": {"max": 9}}}, "constraints"),
    ],
)
def test_a_changed_study_is_refused_and_loses_nothing(study_data, runs, change, field):
    run(study_data, runs, **{"budget.trials": 1})
    before = (runs / "toys" / "study.json").read_text()
    with pytest.raises(WorkbenchError, match="started differently") as caught:
        run(study_data, runs, **change)
    assert field in str(caught.value)
    assert (runs / "toys" / "study.json").read_text() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"objectives": ["toy_los"]}, "metric in objectives 'toy_los'. Did you mean 'toy_loss'"),
        ({"report": ["toy_dept"]}, "metric in report 'toy_dept'. Did you mean 'toy_depth'"),
        ({"constraints": {"toy": {"max": 1}}}, "metric in constraints 'toy'"),
        ({"metrics": {"toy": {}}}, r"metric under \[metrics\] 'toy'"),
        ({"data.source": "countin"}, "data source in data.source 'countin'. Did you mean 'count"),
        ({"data.vocab": 3}, "Did you mean 'vocab_size'"),
        ({"metrics": {"toy_loss": {"k": 1}}}, "field of metrics.toy_loss 'k'"),
        ({"training.tokens": 3}, "training.tokens"),
        ({"training.lr": float("nan")}, "training.lr: nan is no finite number"),
        ({"sampler": {"class": ".x.y"}}, "cannot be imported"),
        ({"training.optimizer": "sgd"}, "training.optimizer"),
        ({"sampler": {"class": "optuna.samplers.TPE"}}, "cannot be imported"),
        ({"sampler": {"class": "json.JSONDecoder"}}, "no optuna sampler"),
        ({"sampler": {"n_startup": 3}}, "refuses its arguments"),
        ({"runtime.device": "gpu"}, "runtime.device: 'gpu' is no device"),
    ],
)
def test_mistakes_leave_no_study_behind(study_data, runs, change, words):
    with pytest.raises(WorkbenchError, match=words):
        run(study_data, runs, **change)
    assert not (runs / "toys").exists()


def test_another_sampler_by_import_string(study_data, runs):
    sampler = {"class": "optuna.samplers.NSGAIISampler", "population_size": 4}
    study = run(study_data, runs, sampler=sampler, **{"budget.trials": 6})
    assert sum(t.outcome == "complete" for t in study.trials()) == 6


SLOW = """
import json, sys
from workbench.study import Reporter, run_study
from workbench.study_config import StudyConfig

class Loud(Reporter):
    def trial_progress(self, number, step, steps, loss):
        print("progress", number, step / steps, flush=True)

if __name__ == "__main__":
    run_study(StudyConfig.from_dict(json.loads(sys.argv[1])), sys.argv[2], Loud())
"""


def start_slow(study_data, runs: Path) -> subprocess.Popen[str]:
    """A study of slow trials in a process of its own, in the middle of its first training."""
    config = make_config(slow(study_data)).to_dict()
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, json.dumps(config), str(runs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("progress") and float(line.split()[2]) > 0.3:
            return process
    raise AssertionError(process.stderr.read() if process.stderr else "")


def slow(study_data):
    study_data["space"].update(mixers=["slow"], layers={}, num_layers=1)
    study_data["runtime"]["executor"] = "process"
    study_data["training"].update(tokens=1280, checkpoint_seconds=0.001)
    study_data["budget"]["trials"] = 2
    return study_data


def stop(process: subprocess.Popen[str], number: int) -> None:
    process.send_signal(number)
    process.communicate(timeout=60)


def workers_of(parent: int) -> set[int]:
    listing = subprocess.run(
        ["ps", "-o", "pid,args", "--ppid", str(parent)], capture_output=True, text=True, check=True
    ).stdout
    return {int(line.split()[0]) for line in listing.splitlines() if "executors.worker" in line}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
@pytest.mark.slow
def test_a_stopped_study_resumes_its_trial_from_the_checkpoint(study_data, tmp_path, number):
    whole = run(slow(study_data), tmp_path / "whole")
    process = start_slow(study_data, tmp_path / "runs")
    children = workers_of(process.pid)
    assert len(children) == 1
    stop(process, number)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children), "an orphan worker"
    interrupted = load_study("toys", tmp_path / "runs")
    assert interrupted.trial(0).outcome in ("interrupted", "running")
    resumed = run(study_data, tmp_path / "runs")
    assert_all_accounted_for(resumed)
    first, again = resumed.trial(0), resumed.trial(1)
    assert first.outcome == "interrupted"
    assert again.data["retry_of"] == 0
    assert again.params == first.params
    assert again.outcome == "complete"
    # The losses of the whole run, and less time than it took: the checkpoint was used.
    assert list(again.curve()["loss"]) == list(whole.trial(0).curve()["loss"])
    assert again.data["stage_seconds"]["training"] < 0.8 * again.curve()["seconds"].iloc[-1]
    complete = [t.params for t in resumed.trials() if t.outcome == "complete"]
    assert complete == [t.params for t in whole.trials() if t.outcome == "complete"]


def test_a_second_process_on_one_study_is_refused(study_data, runs):
    process = start_slow(study_data, runs)
    try:
        with pytest.raises(WorkbenchError, match="another process"):
            run(study_data, runs)
    finally:
        stop(process, signal.SIGKILL)


def test_a_trial_recorded_but_not_told_is_told_on_resume(study_data, runs, tmp_path, monkeypatch):
    """The process dies between writing the record and telling the storage."""
    from workbench import storage

    constraint = {"constraints": {"toy_weights": {"max": 1000}}, "budget.trials": 4}
    whole = run(study_data, tmp_path / "whole", **constraint)
    real = storage.tell

    def die_at(number):
        def tell(study, trial, *arguments):
            if trial.number == number:
                raise SystemExit
            real(study, trial, *arguments)

        return tell

    for number in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(storage, "tell", die_at(number))
            with pytest.raises(SystemExit):
                run(study_data, runs, **constraint)
    study = run(study_data, runs, **constraint)
    assert [t.params for t in study.trials()] == [t.params for t in whole.trials()]
    assert [t.outcome for t in study.trials()] == [t.outcome for t in whole.trials()]
    told = [(t.state, t.values, t.constraints) for t in storage_trials(study)]
    assert told == [(t.state, t.values, t.constraints) for t in storage_trials(whole)]
    assert_all_accounted_for(study)


@pytest.mark.parametrize(
    ("limit", "d_model"),
    [
        pytest.param(20_000, [8, 12, 16], id="at the start"),
        pytest.param(115_000, [8, 12, 16], id="storage grows"),
        pytest.param(300_000, [256, 272, 288], id="weights"),
    ],
)
@pytest.mark.slow
def test_a_full_disk_is_a_message_and_resumable(study_data, runs, limit, d_model):
    """A file size limit makes every write past it fail, as a full disk does."""
    code = (
        "import json, resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n" + SLOW
    )
    config = make_config(study_data, **{"space.d_model": d_model, "budget.trials": 8})
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(config.to_dict()), str(runs)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(("workbench.errors.WorkbenchError: ", "workbench.errors.DiskError: "))
    study = run_study(config, runs)
    assert sum(t.outcome == "complete" for t in study.trials()) == 8
    assert_all_accounted_for(study)
    assert not list(study.path.rglob("*.tmp"))


def test_an_unwritable_runs_folder_is_a_message(study_data, tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(WorkbenchError):
        run(study_data, tmp_path / "runs")


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
