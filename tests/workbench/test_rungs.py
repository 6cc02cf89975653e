"""Rungs: who goes on, and that a training which paused is the one that did not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.workbench.conftest import make_config
from tests.workbench.studies import assert_all_accounted_for, run, storage_trials
from tests.workbench.test_study_faults import slow
from workbench import Metric, WorkbenchError
from workbench import trial as trials
from workbench.pareto import pareto_front
from workbench.records import load_study
from workbench.rungs import CONTINUE, STOP, Peer, Peers, Rungs
from workbench.study import Reporter, run_study
from workbench.study_config import RungsConfig

NOBODY_STOPS = {"at": [0.25, 0.5], "min_peers": 1000}


class Exact(Metric):
    stage = "static"

    def measure(self, subject):
        raise NotImplementedError


class Trained(Exact):
    stage = "trained"
    direction = "maximize"


class Late(Exact):
    stage = "quantized"


METRICS = {"exact": Exact(None), "trained": Trained(None), "late": Late(None)}


def make_rungs(steps=100, objectives=("exact", "trained"), **config) -> Rungs:
    return Rungs(RungsConfig(**{"at": (0.1, 0.5), **config}), METRICS, objectives, steps)


def peer(number: int, exact: float, trained: float, layout_hash: str | None = None) -> Peer:
    rung = {"metrics": {"trained": trained}}
    return Peer(number, layout_hash or str(number), {"exact": exact}, [rung])


figures = st.integers(-3, 3).map(float)
points = st.lists(st.tuples(figures, figures), min_size=1, max_size=8)


@given(points)
def test_without_a_margin_a_rung_stops_what_is_off_the_front(points):
    peers = [peer(number, *point) for number, point in enumerate(points)]
    front = set(pareto_front([[exact, -trained] for exact, trained in points]))
    for own in peers:
        found = make_rungs().decide(own, peers)
        assert (found["decision"] == CONTINUE) == (own.number in front)
        assert found["peers"] == len(peers) - 1
        if found["decision"] == STOP:
            by = points[found["dominated_by"]]
            assert by[0] <= own.metrics["exact"]
            assert by[1] >= own.rungs[0]["metrics"]["trained"]


@given(points, st.floats(0, 2))
def test_a_margin_only_ever_spares(points, margin):
    peers = [peer(number, *point) for number, point in enumerate(points)]
    for own in peers:
        strict = make_rungs().decide(own, peers)["decision"]
        lenient = make_rungs(margin=margin).decide(own, peers)["decision"]
        assert (strict, lenient) != (CONTINUE, STOP)


def test_a_margin_is_a_share_of_what_training_yields():
    own = peer(0, 5.0, 100.0)
    rungs = make_rungs(margin=0.1)
    assert rungs.decide(own, [peer(1, 5.0, 109.0)])["decision"] == CONTINUE
    assert rungs.decide(own, [peer(1, 5.0, 111.0)])["decision"] == STOP
    assert rungs.decide(own, [peer(1, 5.001, 200.0)])["decision"] == CONTINUE  # exact, and worse


def test_who_is_a_peer():
    own = peer(5, 1.0, 1.0)
    better = peer(1, 0.0, 2.0)
    assert make_rungs().decide(own, [better])["decision"] == STOP
    same_layout = peer(2, 0.0, 2.0, layout_hash="5")  # the trial that this one repeats
    assert make_rungs().decide(own, [same_layout]) == {"decision": CONTINUE, "peers": 0}
    again = peer(3, 0.0, 2.0, layout_hash="1")
    expected = {"decision": CONTINUE, "peers": 1}  # one layout, however often it was begun
    assert make_rungs(min_peers=2).decide(own, [better, again]) == expected
    further = Peer(5, "5", {"exact": 1.0}, own.rungs * 2)
    assert make_rungs().decide(further, [better])["peers"] == 0  # it has not come this far


def test_an_objective_that_no_rung_shows_has_no_rungs():
    assert make_rungs(objectives=("exact", "trained", "late"), at=()).steps == ()
    with pytest.raises(WorkbenchError, match="objective 'late' cannot be had from a partly"):
        make_rungs(objectives=("exact", "trained", "late"))


def test_the_next_rung():
    rungs = make_rungs()
    assert rungs.steps == (10, 50)
    assert [rungs.next_step([None] * passed) for passed in range(3)] == [10, 50, None]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rungs": {"at": [0.5, 0.3]}}, "rungs.at: must be ascending"),
        ({"rungs": {"at": [0.5, 0.5]}}, "rungs.at: must be ascending"),
        ({"rungs": {"at": [1.0]}}, r"rungs.at\[0\]: is a share between 0 and 1"),
        ({"rungs": {"at": [0.01]}}, r"rungs.at\[0\]: 0.01 of 8 training steps is step 0"),
        ({"rungs": {"at": [0.5, 0.51]}}, r"rungs.at\[1\]: 0.51 of 8 training steps is step 4"),
        ({"rungs": {"at": [0.5], "margin": -1}}, "rungs.margin"),
        ({"rungs": {"at": [0.5], "min_peers": 0}}, "rungs.min_peers"),
        ({"rungs": {"att": [0.5]}}, "Did you mean 'at'"),
        ({"rungs": {"at": [0.5]}, "objectives": ["toy_weights"]}, "rungs.at: no objective can be"),
    ],
)
def test_rungs_that_cannot_be_are_refused_before_any_work(study_data, runs, change, words):
    with pytest.raises(WorkbenchError, match=words):
        run(study_data, runs, **change)
    assert not (runs / "toys").exists()


@pytest.mark.parametrize("executor", ["inline", "process"])
def test_pauses_change_no_figure(study_data, tmp_path, executor):
    """The same losses, metrics and weights, to the bit, and nothing measured twice."""
    changes = {"runtime.executor": executor, "budget.trials": 2}
    whole = run(study_data, tmp_path / "whole", **changes)
    paused = run(study_data, tmp_path / "paused", rungs=NOBODY_STOPS, **changes)
    assert_all_accounted_for(paused)
    assert [t.params for t in whole.trials()] == [t.params for t in paused.trials()]
    for one, other in zip(whole.trials(), paused.trials(), strict=True):
        assert one.metrics == other.metrics
        assert list(one.curve()["loss"]) == list(other.curve()["loss"])
        if one.outcome != "complete":
            continue
        mine, theirs = load_file(one.weights), load_file(other.weights)
        assert mine.keys() == theirs.keys()
        assert all(bool((mine[name] == theirs[name]).all()) for name in mine)
        assert not (other.path / "checkpoint.safetensors").exists()
        assert one.data["rungs"] == []
        rungs = other.data["rungs"]
        assert [(r["share"], r["step"], r["tokens"]) for r in rungs] == [
            (0.25, 2, 128),
            (0.5, 4, 256),
        ]
        assert all(r["decision"] == CONTINUE and r["seconds"] > 0 for r in rungs)
        losses = [r["metrics"]["toy_loss"] for r in rungs]
        assert losses[0] > losses[1] > other.metrics["toy_loss"]
        assert set(rungs[0]["metrics"]) == {"toy_loss"}
        assert "rungs" in other.data["stage_seconds"]


def test_a_damaged_checkpoint_costs_time_and_no_trial(study_data, tmp_path, monkeypatch):
    real, damaged = trials.train, []

    def on_a_disk_that_fails(*arguments, checkpoint, **named):
        if checkpoint.exists() and not damaged:
            os.truncate(checkpoint, checkpoint.stat().st_size // 2)
            damaged.append(str(checkpoint))
        return real(*arguments, checkpoint=checkpoint, **named)

    changes = {"runtime.executor": "inline", "budget.trials": 2, "rungs": NOBODY_STOPS}
    whole = run(study_data, tmp_path / "whole", **changes).trials()
    monkeypatch.setattr(trials, "train", on_a_disk_that_fails)
    found = run(study_data, tmp_path / "damaged", **changes).trials()
    assert len(damaged) == 1
    notes = [note for t in found if (note := t.data["details"].get("restarted"))]
    assert len(notes) == 1
    assert notes[0].startswith(f"checkpoint {damaged[0]} is damaged")
    for one, other in zip(whole, found, strict=True):
        assert (one.outcome, one.metrics) == (other.outcome, other.metrics)
        assert list(one.curve()["loss"]) == list(other.curve()["loss"])


def test_dominated_trials_stop_and_the_sampler_goes_on(study_data, runs):
    """Past TPE's ten random trials: what is told of stopped ones does not break it."""
    heard = []

    class Listener(Reporter):
        def trial_rung(self, number, rung):
            heard.append((number, rung["step"], rung["decision"]))

    config = make_config(study_data, rungs={"at": [0.5]}, **{"budget.trials": 16})
    study = run_study(config, runs, Listener())
    assert_all_accounted_for(study)
    stopped = [trial for trial in study.trials() if trial.outcome == "stopped"]
    complete = [trial for trial in study.trials() if trial.outcome == "complete"]
    assert stopped
    assert len(stopped) + len(complete) == 16
    assert [item for item in heard if item[2] == STOP] == [(t.number, 4, STOP) for t in stopped]
    frozen = storage_trials(study)
    for trial in stopped:
        rung = trial.data["rungs"][-1]
        peer = study.trial(rung["dominated_by"])
        assert peer.data["rungs"][0]["metrics"]["toy_loss"] <= rung["metrics"]["toy_loss"]
        assert peer.metrics["toy_weights"] <= trial.metrics["toy_weights"]
        assert f"trial {peer.number} dominated it at step 4 (50% of the training)" == trial.reason
        assert len(trial.curve()) == 4
        assert "toy_loss" not in trial.metrics
        told = frozen[trial.number]
        assert (told.state.name, told.values, told.intermediate_values) == ("PRUNED", None, {})
        assert not list(trial.path.glob("*.safetensors"))
    for trial in study.trials():
        if trial.outcome == "duplicate" and trial.data["duplicate_outcome"] == "stopped":
            assert frozen[trial.number].state.name == "PRUNED"
    # A rung is part of what makes figures comparable.
    with pytest.raises(WorkbenchError, match=r"rungs\.at"):
        run(study_data, runs, rungs={"at": [0.25]}, **{"budget.trials": 17})


def test_a_failed_trial_is_no_peer(tmp_path):
    rung = {"step": 4, "metrics": {"toy_loss": 1.0}}
    for number, outcome in enumerate(
        ["complete", "stopped", "running", "diverged", "error", "infeasible", "timeout"]
    ):
        folder = tmp_path / "trials" / f"{number:05d}"
        folder.mkdir(parents=True)
        record = {
            "number": number, "outcome": outcome, "layout_hash": str(number), "metrics": {},
            "rungs": [rung],
        }  # fmt: skip
        (folder / "trial.json").write_text(json.dumps(record))
    peers = Peers(tmp_path)
    assert [peer.number for peer in peers.now()] == [0, 1, 2]
    record["outcome"] = "complete"
    (folder / "trial.json").write_text(json.dumps(record))
    assert [peer.number for peer in peers.now()] == [0, 1, 2, number]
    before = (folder / "trial.json").stat()
    record["rungs"][0]["metrics"]["toy_loss"] = 2.0  # as long, and written in the same tick
    (folder / "new.json").write_text(json.dumps(record))
    os.utime(folder / "new.json", ns=(before.st_atime_ns, before.st_mtime_ns))
    (folder / "new.json").rename(folder / "trial.json")
    assert peers.now()[-1].rungs[0]["metrics"] == {"toy_loss": 2.0}


KILLED = """
import json, os, signal, sys
from workbench.study import Reporter, run_study
from workbench.study_config import StudyConfig

class Deadly(Reporter):
    def trial_progress(self, number, step, steps, loss):
        if step == 14:  # between the rungs of steps 10 and 16
            os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    run_study(StudyConfig.from_dict(json.loads(sys.argv[1])), sys.argv[2], Deadly())
"""


@pytest.mark.slow
def test_a_killed_study_goes_on_between_its_rungs(study_data, tmp_path):
    data = slow(study_data)  # 20 steps
    data["training"]["checkpoint_seconds"] = 0.0  # none but those of rungs
    data["budget"]["trials"] = 1
    data["rungs"] = {"at": [0.5, 0.8]}
    whole = run(data, tmp_path / "whole")
    config = make_config(data).to_dict()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(config), str(tmp_path / "runs")], check=False
    )
    assert done.returncode == -signal.SIGKILL
    left = load_study("toys", tmp_path / "runs").trial(0)
    assert left.outcome == "running"
    assert [rung["step"] for rung in left.data["rungs"]] == [10]
    heard = []

    class Listener(Reporter):
        def trial_phase(self, number, phase):
            heard.append(phase)

        def trial_progress(self, number, step, steps, loss):
            heard.append(step)

    resumed = run_study(make_config(data), tmp_path / "runs", Listener())
    assert_all_accounted_for(resumed)
    again = resumed.trial(1)
    assert (again.outcome, again.data["retry_of"]) == ("complete", 0)
    assert "measuring" not in heard  # known since before the rung
    assert [step for step in heard if isinstance(step, int)] == list(range(11, 21))
    assert again.metrics == whole.trial(0).metrics
    assert list(again.curve()["loss"]) == list(whole.trial(0).curve()["loss"])
    assert [r["metrics"] for r in again.data["rungs"]] == [
        r["metrics"] for r in whole.trial(0).data["rungs"]
    ]
    assert again.data["rungs"][0] == left.data["rungs"][0]
    assert os.path.getsize(again.weights)
