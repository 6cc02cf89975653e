"""Judges trials in worker processes: what kills one kills a trial, never the study."""

from __future__ import annotations

import dataclasses
import os
import selectors
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import kernels
from workbench.errors import WorkbenchError
from workbench.executors.base import Ended, Executor, Heard, Job, Task
from workbench.executors.worker_process import ForkSource, WorkerDiedError, WorkerProcess
from workbench.verdict import Verdict

if TYPE_CHECKING:
    from workbench.trial import Workplace

STICKY = ("error", "out_of_memory")  # may leave a process or its device in a state of their own
START_TIMEOUT = 300.0  # seconds for a worker to import everything and open its data
VISIBLE = "CUDA_VISIBLE_DEVICES"


def open_executor(place: Workplace, cache_dir: Path) -> ProcessExecutor:
    """The executor of a study: `[runtime] workers` processes, by default one a device."""
    import torch

    from workbench.identity import used_plugins

    devices = device_environments(place.device, torch.cuda.device_count)
    count = place.config.runtime.workers or len(devices)
    return ProcessExecutor(
        job_of(place, cache_dir, used_plugins(place.config, place.builder), count),
        [devices[index % len(devices)] for index in range(count)],
    )


def job_of(place: Workplace, cache_dir: Path, plugins: dict[str, str], workers: int) -> Job:
    """What each of several workers on one machine must know.

    Each sees one device, and takes its share of the cores unless `[runtime] threads` says more.
    """
    config, device = place.config, place.device
    if workers > 1 and config.runtime.threads is None:
        threads = max(1, (os.cpu_count() or 1) // workers)
        config = dataclasses.replace(
            config, runtime=dataclasses.replace(config.runtime, threads=threads)
        )
    if device.startswith("cuda:"):
        device = "cuda:0"
    return Job(
        config=config,
        device=device,
        cache_dir=cache_dir,
        plugins=plugins,
        probed=kernels.found(),
    )


def device_environments(device: str, count: Any) -> list[dict[str, str]]:
    """The variables that show a process one device, for each device that a study may use.

    Args:
        device: `cpu`, `cuda` (all that are visible) or `cuda:N`.
        count: a function to the number of CUDA devices; called only where it matters.
    """
    if not device.startswith("cuda"):
        return [{}]
    listed = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    names = listed or [str(index) for index in range(count())]
    if device != "cuda":
        names = [names[int(device.removeprefix("cuda:"))]]
    return [{VISIBLE: name} for name in names]


class ProcessExecutor(Executor):
    """One persistent worker a slot, started at its first task and again whenever it died.

    Args:
        job: what the workers must know.
        environments: the variables of each worker; as many as there are slots.
    """

    def __init__(self, job: Job, environments: Sequence[Mapping[str, str]] = ({},)) -> None:
        self.job = job
        self.timeout = job.config.budget.trial_timeout
        self._environments = environments
        self._workers: dict[int, WorkerProcess] = {}  # by slot
        self._source: ForkSource | None = None
        self._ended: list[Ended] = []
        self._selector = selectors.DefaultSelector()

    @property
    def slots(self) -> int:
        return len(self._environments)

    def submit(self, task: Task) -> None:
        worker = self._workers[self._free_slot()]
        worker.trial = task.number
        try:
            if worker.facts is None:  # it reads the task once it is ready
                worker.deadline = time.monotonic() + START_TIMEOUT
                worker.send(self.job.to_dict())
            else:
                worker.deadline = self._deadline()
            worker.send(task.to_dict())
        except WorkerDiedError as error:
            self._died(worker, error)

    def _free_slot(self) -> int:
        """A slot whose worker is idle; a worker that runs already before one to be started."""
        for worker in list(self._workers.values()):
            if worker.trial is None and worker.process.poll() is not None:
                self._end(worker)
        idle = [slot for slot, worker in self._workers.items() if worker.trial is None]
        if idle:
            return min(idle)
        slot = min(set(range(self.slots)) - self._workers.keys())
        environment = self._environments[slot]
        self._workers[slot] = worker = WorkerProcess(environment, self._source_for(environment))
        self._selector.register(worker, selectors.EVENT_READ)
        return slot

    def _source_for(self, environment: Mapping[str, str]) -> ForkSource | None:
        """What a new worker is forked from; None where it has to start by itself."""
        if self.job.device != "cpu" or environment or sys.platform != "linux":
            return None
        if self._source is None or self._source.process.poll() is not None:
            self._close_source()
            self._source = ForkSource()
        return self._source

    def _close_source(self) -> None:
        if self._source is not None:
            self._source.close()

    def _deadline(self) -> float | None:
        return None if self.timeout is None else time.monotonic() + self.timeout

    def wait(self, heard: Heard, timeout: float | None = None) -> list[Ended]:
        until = None if timeout is None else time.monotonic() + timeout
        while not self._ended:
            deadlines = [worker.deadline for worker in self._busy() if worker.deadline is not None]
            if until is None and not self._busy():
                return []
            first = min([*deadlines, *([] if until is None else [until])], default=None)
            ready = self._selector.select(None if first is None else first - time.monotonic())
            answering: list[Any] = [key.fileobj for key, _ in ready]
            for worker in answering:
                self._read(worker, heard)
            # Who has answered is not late, even if we are late to read it.
            self._end_late([worker for worker in self._busy() if worker not in answering])
            if until is not None and time.monotonic() >= until:
                break
        ended, self._ended = self._ended, []
        return ended

    def _busy(self) -> list[WorkerProcess]:
        return [worker for worker in self._workers.values() if worker.trial is not None]

    def _read(self, worker: WorkerProcess, heard: Heard) -> None:
        try:
            messages = worker.receive()
        except WorkerDiedError as error:
            self._died(worker, error)
            return
        for message in messages:
            if "failed" in message:
                raise WorkbenchError(f"no worker could be started: {message['failed']}")
            if "ready" in message:
                worker.facts = message["environment"]
                worker.deadline = self._deadline()
            elif "verdict" in message:
                self._finish(worker, Verdict(**message["verdict"]))
                if self._ended[-1][1].outcome in STICKY:
                    self._end(worker)
            elif worker.trial is not None:
                heard(worker.trial, message)

    def _finish(self, worker: WorkerProcess, verdict: Verdict) -> None:
        assert worker.trial is not None
        self._ended.append((worker.trial, verdict))
        worker.trial = worker.deadline = None

    def _died(self, worker: WorkerProcess, error: WorkerDiedError) -> None:
        self._end(worker)
        if worker.facts is None:
            raise WorkbenchError(f"no worker could be started: {error}") from None
        if worker.trial is not None:
            self._finish(worker, self._killed(worker, "crashed", str(error)))

    def _end_late(self, workers: Sequence[WorkerProcess]) -> None:
        now = time.monotonic()
        for worker in workers:
            if worker.deadline is None or now < worker.deadline:
                continue
            self._end(worker)
            if worker.facts is None:
                raise WorkbenchError(
                    f"no worker could be started: not ready within {START_TIMEOUT:g} s"
                )
            reason = f"took longer than {self.timeout:g} s"
            self._finish(worker, self._killed(worker, "timeout", reason))

    def _killed(self, worker: WorkerProcess, outcome: str, reason: str) -> Verdict:
        details = {"environment": worker.facts or {}}
        return Verdict(outcome=outcome, reason=reason, details=details)

    def _end(self, worker: WorkerProcess) -> None:
        self._selector.unregister(worker)
        del self._workers[next(slot for slot, one in self._workers.items() if one is worker)]
        worker.kill()

    def interrupt(self) -> None:
        """End the workers from another thread; what they are at ends as crashed."""
        for worker in list(self._workers.values()):
            worker.interrupt()

    def cancel(self) -> None:
        for worker in self._busy():
            self._end(worker)
        self._ended.clear()

    def close(self) -> None:
        self.cancel()
        for worker in list(self._workers.values()):
            self._end(worker)
        self._close_source()
