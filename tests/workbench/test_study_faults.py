"""Studies survive what trials, users, disks and a dying process do to them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.workbench.conftest import make_config
from tests.workbench.studies import assert_all_accounted_for, run, storage_trials
from workbench import WorkbenchError
from workbench.records import load_study
from workbench.study import run_study

TIMEOUT = 6.0  # of the hanging layer: an age for a toy trial, little for a test


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
    from workbench.executors.inline import InlineExecutor

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(InlineExecutor, "wait", stop)
        for _ in range(4):
            with pytest.raises(KeyboardInterrupt):
                run(study_data, runs, **{"budget.retries": 0, "budget.trials": 1})
    study = run(study_data, runs, **{"budget.retries": 0, "budget.trials": 1})
    assert [t.outcome for t in study.trials()] == ["interrupted"] * 4 + ["complete"]
    assert len({json.dumps(t.params) for t in study.trials()}) == 1
    assert_all_accounted_for(study)


def test_a_lost_storage_is_refused(study_data, runs):
    study = run(study_data, runs, **{"budget.trials": 2})
    (study.path / "optuna.db").unlink()
    with pytest.raises(WorkbenchError, match="storage was lost"):
        run(study_data, runs)
    assert len(load_study("toys", runs).trials()) == len(study.trials())


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
    """Worker processes, and the one that they are forked from."""
    pairs = ["ps", "-eo", "pid,ppid,args"]
    listing = subprocess.run(pairs, capture_output=True, text=True, check=True).stdout
    found = {parent}
    for _ in range(2):
        for line in listing.splitlines()[1:]:
            pid, ppid, args = line.split(maxsplit=2)
            if int(ppid) in found and "executors.worker" in args:
                found.add(int(pid))
    return found - {parent}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
@pytest.mark.slow
def test_a_stopped_study_resumes_its_trial_from_the_checkpoint(study_data, tmp_path, number):
    whole = run(slow(study_data), tmp_path / "whole")
    process = start_slow(study_data, tmp_path / "runs")
    children = workers_of(process.pid)
    assert len(children) == 2
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
    # The losses of the whole run, and less time than its steps took: the checkpoint was used.
    assert list(again.curve()["loss"]) == list(whole.trial(0).curve()["loss"])
    assert again.data["stage_seconds"]["training"] < again.curve()["seconds"].iloc[-1]
    complete = [t.params for t in resumed.trials() if t.outcome == "complete"]
    assert complete == [t.params for t in whole.trials() if t.outcome == "complete"]


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
