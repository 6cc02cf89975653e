"""Studies on a real local Ray cluster: of one node, and of two of which one is killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from threading import Thread

import pytest

pytest.importorskip("ray")

from tests.workbench.conftest import make_config
from tests.workbench.studies import assert_all_accounted_for
from tests.workbench.test_executors import gone
from tests.workbench.test_study_faults import SLOW, slow, stop
from workbench import WorkbenchError
from workbench.executors.ray_actors import Slot, sees
from workbench.records import load_study
from workbench.study import Reporter, run_study

RAY = {"runtime.executor": "ray", "runtime.threads": 1}
# Ray leaves sockets and processes to its own exit handlers, and warns of its own future.
pytestmark = [
    pytest.mark.xdist_group("ray"),  # clusters of one machine get in each other's way
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"runtime.address": "auto"}, "no Ray cluster answers at auto: .*ray start --head"),
        ({"runtime.address": "127.0.0.1:{port}"}, "no Ray cluster answers at 127.0.0.1:.*refused"),
        ({"runtime.address": "ray://127.0.0.1:{port}"}, "no Ray cluster answers at ray://"),
        ({"runtime.address": "cluster"}, "is not auto, host:port or ray://host:port"),
        ({"runtime.address": "http://127.0.0.1:80"}, "is not auto, host:port or ray://host:port"),
    ],
)
def test_a_cluster_that_cannot_be_reached(study_data, runs, changes, words):
    changes = {name: value.format(port=free_port()) for name, value in changes.items()}
    began = time.monotonic()
    with pytest.raises(WorkbenchError, match=words):
        run_study(make_config(study_data, **RAY, **changes), runs)
    assert time.monotonic() - began < 30
    assert not (runs / "toys").exists()
    assert not list((runs / ".cache").glob("ray-*"))


@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize(
    ("answer", "words"),
    [(b"HTTP/1.1 400 Bad Request\r\n\r\n", "is not Ray"), (b"", "is not Ray"), (None, "timed out")],
)
def test_what_listens_at_an_address_may_be_something_else(
    study_data, runs, monkeypatch, scheme, answer, words
):
    """Ray itself waits for minutes for a server that is none of its own."""
    monkeypatch.setattr("workbench.executors.ray.REACH", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                if answer is None:
                    connection.recv(1000)  # until the other side has gone
                else:
                    connection.sendall(answer)

        thread = Thread(target=serve, daemon=True)
        thread.start()
        address = f"{scheme}127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(WorkbenchError, match=f"no Ray cluster answers at {address}: .*{words}"):
            run_study(make_config(study_data, **RAY, **{"runtime.address": address}), runs)
        thread.join(10)
    assert not (runs / "toys").exists()


def test_an_address_is_of_ray(study_data):
    with pytest.raises(WorkbenchError, match=r"runtime\.address: is of a Ray cluster"):
        make_config(study_data, **{"runtime.address": "auto"})


def test_a_node_that_does_not_share_the_runs_folder(tmp_path):
    (tmp_path / "token").touch()
    assert sees(str(tmp_path / "token"))
    missing = tmp_path / "shared" / "runs" / ".cache" / "token"
    slot = object.__new__(Slot)
    slot._token = str(missing)
    answer = slot.judge({}, None)
    assert answer["failed"].endswith(f"does not share {tmp_path / 'shared' / 'runs'}")


@pytest.mark.slow
def test_a_study_on_a_cluster_of_this_machine(study_data, runs, monkeypatch):
    """Started and ended by the study; a crash, rungs and progress come through as they do here."""
    heard: Counter[str] = Counter()
    monkeypatch.setenv("PGPASSWORD", "geheim")

    class Listener(Reporter):
        def trial_started(self, number, pattern):
            for process in descendants(os.getpid()):
                with contextlib.suppress(OSError):  # it has ended
                    environment = Path(f"/proc/{process}/environ").read_bytes()
                    heard["processes"] += 1
                    heard["told"] += b"geheim" in environment

        def trial_progress(self, number, step, steps, loss):
            heard["progress"] += 1

        def trial_rung(self, number, rung):
            heard[rung["decision"]] += 1

    study_data["space"].update(mixers=["dies", "other"], layers={}, num_layers=1)
    config = make_config(
        study_data,
        rungs={"at": [0.5]},
        **{**RAY, "runtime.workers": 2, "budget.trials": 4, "budget.retries": 0},
    )
    study = run_study(config, runs, Listener())
    assert_all_accounted_for(study)
    outcomes = Counter(trial.outcome for trial in study.trials())
    assert outcomes["crashed"] >= 1
    assert all("SIGKILL" in t.reason for t in study.trials() if t.outcome == "crashed")
    assert outcomes["complete"] >= 1
    assert heard["progress"] > 8
    assert heard["continue"] == outcomes["complete"]
    assert heard["processes"] > 5
    assert not heard["told"]
    assert not list((runs / ".cache").glob("ray-*"))
    import ray

    assert not ray.is_initialized()


def descendants(parent: int) -> set[int]:
    listing = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True)
    pairs = [tuple(map(int, line.split())) for line in listing.stdout.splitlines()[1:]]
    found = {parent}
    while more := {pid for pid, of in pairs if of in found} - found:
        found |= more
    return found - {parent}


@pytest.mark.slow
def test_ctrl_c_ends_all_that_was_started(study_data, runs):
    """Slots, their workers and the cluster of this machine; what was in flight runs again."""
    config = make_config(
        slow(study_data), **{**RAY, "runtime.workers": 2, "training.tokens": 64 * 100}
    )
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, json.dumps(config.to_dict()), str(runs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert any(line.startswith("progress") for line in process.stdout)
    started = descendants(process.pid)
    lines = [Path(f"/proc/{pid}/cmdline").read_text() for pid in started]
    assert any("executors.worker" in line for line in lines)
    stop(process, signal.SIGINT)
    assert gone(started)
    trials = load_study("toys", runs).trials()
    assert {trial.outcome for trial in trials} == {"interrupted"}
    assert not list((runs / ".cache").glob("ray-*"))


@pytest.mark.slow
def test_a_node_killed_in_the_middle_of_a_study(study_data, runs):
    """Two nodes of one slot: what the lost one was at runs again on the other."""
    import ray
    from ray.cluster_utils import Cluster

    data = slow(study_data)
    data["training"]["tokens"] = 64 * 60
    data["space"]["d_model"] = [8, 12, 16, 20, 24]
    data["runtime"].update(executor="ray", threads=1)
    data["budget"].update(trials=4, retries=2)
    data["seed"] = 1
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    try:
        other = cluster.add_node(**small)
        cluster.wait_for_nodes()
        slots = []

        class Killer(Reporter):
            """Kills the second node once two trials are in training."""

            def trial_progress(self, number, step, steps, loss):
                slots.append(number)
                if len(set(slots)) == 2 and not killed:
                    killed.append(number)
                    cluster.remove_node(other, allow_graceful=False)

        killed: list[int] = []
        data["runtime"]["address"] = cluster.address
        study = run_study(make_config(data), runs, Killer())
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert killed
    assert_all_accounted_for(study)
    trials = study.trials()
    outcomes = Counter(trial.outcome for trial in trials)
    assert outcomes["complete"] == 4
    crashed = [trial for trial in trials if trial.outcome == "crashed"]
    assert 1 <= len(crashed) <= 2  # what was sent there before Ray knew is lost again
    for lost in crashed:
        assert "Ray" in lost.reason
        (again,) = [t for t in trials if t.data["retry_of"] == lost.number]
        assert again.params == lost.params
    judged = [t.data["layout_hash"] for t in trials if t.outcome == "complete"]
    assert len(set(judged)) == 4
    assert all(t.weights.exists() for t in trials if t.outcome == "complete")
