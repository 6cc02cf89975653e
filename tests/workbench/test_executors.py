"""Executors: several workers at a time, and what befalls one of them leaves the others alone."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.workbench.conftest import make_config
from workbench.builder import default_builder
from workbench.executors import Ended, Executor, Job, Task, open_executor
from workbench.executors.process import ProcessExecutor, device_environments, job_of
from workbench.identity import used_plugins
from workbench.layout import Block, Layout
from workbench.trial import Workplace

pytestmark = pytest.mark.usefixtures("own_sources")


@pytest.fixture
def open_workers(study_data, tmp_path):
    """A function to executors of several workers; they are closed with the test."""
    opened: list[ProcessExecutor] = []

    def make(workers: int, **changes) -> ProcessExecutor:
        config = make_config(study_data, **changes)
        builder = default_builder(config.plugin_dirs)
        job = Job(
            config=config,
            device="cpu",
            cache_dir=tmp_path / "cache",
            plugins=used_plugins(config, builder),
        )
        opened.append(ProcessExecutor(job, [{}] * workers))
        return opened[-1]

    yield make
    for executor in opened:
        executor.close()


def task(tmp_path: Path, number: int, layer: str) -> Task:
    folder = tmp_path / "trials" / f"{number:05d}"
    folder.mkdir(parents=True, exist_ok=True)
    layout = Layout(d_model=8, vocab_size=16, blocks=(Block(layer=layer),))
    return Task(number=number, layout=layout, folder=folder)


def drain(executor: Executor, count: int, heard=lambda number, message: None) -> dict[int, object]:
    """The verdicts of `count` trials."""
    ended: list[Ended] = []
    while len(ended) < count:
        ended += executor.wait(heard, 120)
    assert len(ended) == count
    return dict(ended)


def workers(executor: ProcessExecutor) -> set[int]:
    return {worker.process.pid for worker in executor._workers.values()}


def gone(pids: set[int]) -> bool:
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_fault_of_one_worker_leaves_the_others_alone(open_workers, tmp_path):
    """One is killed, one hangs, and one works: at the same time, then all go on."""
    executor = open_workers(3, **{"budget.trial_timeout": 6.0})
    for number, layer in enumerate(("dies", "hangs", "prints")):
        executor.submit(task(tmp_path, number, layer))
    before = workers(executor)
    heard: list[int] = []
    ended = drain(executor, 3, lambda number, message: heard.append(number))
    assert [ended[number].outcome for number in range(3)] == ["crashed", "timeout", "complete"]
    assert "SIGKILL" in ended[0].reason
    assert "longer than 6 s" in ended[1].reason
    assert all(verdict.details["environment"]["versions"]["torch"] for verdict in ended.values())
    assert set(heard) == {0, 1, 2}
    left = workers(executor)
    assert len(left) == 1
    assert left < before
    assert gone(before - left)
    for number, layer in ((3, "prints"), (4, "toy")):
        executor.submit(task(tmp_path, number, layer))
    assert {verdict.outcome for verdict in drain(executor, 2).values()} == {"complete"}
    # Each trial's log holds its own words alone.
    logs = {
        number: (tmp_path / "trials" / f"{number:05d}" / "log.txt").read_text()
        for number in range(5)
    }
    assert {number for number, log in logs.items() if "a plugin that prints" in log} == {2, 3}
    executor.close()
    assert gone(left)


def test_a_worker_that_dies_between_trials_is_replaced(open_workers, tmp_path):
    executor = open_workers(1)
    executor.submit(task(tmp_path, 0, "toy"))
    drain(executor, 1)
    (pid,) = workers(executor)
    os.kill(pid, signal.SIGKILL)
    executor._workers[0].process.wait()
    executor.submit(task(tmp_path, 1, "toy"))
    assert drain(executor, 1)[1].outcome == "complete"


def parent_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("PPid:")[2].split()[0])


def test_workers_are_forked_and_outlive_nothing(open_workers, tmp_path):
    """Of one source; where that is gone, from another, and its workers are gone as well."""
    executor = open_workers(2)
    for number in range(2):
        executor.submit(task(tmp_path, number, "toy"))
    drain(executor, 2)
    before, source = workers(executor), executor._source.process.pid
    assert {parent_of(pid) for pid in before} == {source}
    os.kill(source, signal.SIGKILL)
    executor._source.process.wait()
    executor.submit(task(tmp_path, 2, "toy"))
    assert drain(executor, 1)[2].outcome == "complete"
    assert gone(before)
    after = workers(executor)
    assert {parent_of(pid) for pid in after} == {executor._source.process.pid} != {source}
    sources = {source, executor._source.process.pid}
    executor.close()
    assert gone(after | sources)


def test_closing_does_not_wait_for_a_worker_that_is_not_there_yet(open_workers, tmp_path):
    executor = open_workers(1)
    executor.submit(task(tmp_path, 0, "toy"))
    source = executor._source.process.pid
    clock = time.monotonic()
    executor.close()
    assert time.monotonic() - clock < 1.0
    assert gone({source})


def test_cancelling_ends_what_is_in_flight(open_workers, tmp_path):
    executor = open_workers(2)
    for number in range(2):
        executor.submit(task(tmp_path, number, "hangs"))
    training: set[int] = set()

    def heard(number, message):
        if message.get("phase") == "training":
            training.add(number)

    while training != {0, 1}:
        assert executor.wait(heard, 1.0) == []
    before = workers(executor)
    executor.cancel()
    assert gone(before)
    assert executor.wait(heard, 0.01) == []
    executor.submit(task(tmp_path, 2, "toy"))
    assert drain(executor, 1)[2].outcome == "complete"


def test_a_memory_limit_holds_for_each_worker(open_workers, tmp_path):
    executor = open_workers(2, **{"budget.memory_gb": 64.0})
    executor.submit(task(tmp_path, 0, "starves"))
    executor.submit(task(tmp_path, 1, "toy"))
    limits = {
        Path(f"/proc/{pid}/limits").read_text().split("Max address space")[1].split()[0]
        for pid in workers(executor)
    }
    ended = drain(executor, 2)
    assert [ended[number].outcome for number in range(2)] == ["out_of_memory", "complete"]
    (pid,) = workers(executor)
    after = Path(f"/proc/{pid}/limits").read_text().split("Max address space")[1].split()[0]
    assert limits == {"unlimited"}  # as they start
    assert int(after) == 64_000_000_000


def test_each_worker_sees_one_device(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device_environments("cpu", lambda: 1 / 0) == [{}]
    shown = [{"CUDA_VISIBLE_DEVICES": str(index)} for index in range(3)]
    assert device_environments("cuda", lambda: 3) == shown
    assert device_environments("cuda:1", lambda: 3) == shown[1:2]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, GPU-b")
    listed = [{"CUDA_VISIBLE_DEVICES": name} for name in ("GPU-a", "GPU-b")]
    assert device_environments("cuda", lambda: 2) == listed
    assert device_environments("cuda:1", lambda: 2) == listed[1:]


def test_workers_share_the_cores(study_data, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    del study_data["runtime"]["threads"]
    for changes, wanted in (({}, (12, None)), ({"runtime.workers": 5}, (2, 2))):
        config = make_config(study_data, **{"runtime.executor": "process", **changes})
        place = Workplace(config, default_builder(config.plugin_dirs), "cpu", tmp_path)
        job = job_of(place, tmp_path, {}, config.runtime.workers or 1)
        assert (place.threads, job.config.runtime.threads) == wanted


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"runtime.workers": 2}, "runtime.workers: executor = 'inline' judges one trial at a time"),
    ],
)
def test_what_an_executor_refuses(study_data, tmp_path, changes, words):
    config = make_config(study_data, **changes)
    place = Workplace(config, default_builder(config.plugin_dirs), "cpu", tmp_path)
    with pytest.raises(Exception, match=words):
        open_executor(place, tmp_path)
