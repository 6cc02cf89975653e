"""Judges trials in one worker process: what kills it kills a trial, never the study."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError
from workbench.executors.base import Executor, Job
from workbench.layout import Layout
from workbench.trial import Emit
from workbench.verdict import Verdict

STICKY = ("error", "out_of_memory")  # may leave a process or its device in a state of their own
START_TIMEOUT = 300.0  # seconds for a worker to import everything and open its data


class WorkerDiedError(Exception):
    """The worker's process ended; the message says how."""


class ProcessExecutor(Executor):
    """One persistent worker, started at the first trial and again whenever it died.

    Args:
        job: what the worker must know.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.timeout = job.config.budget.trial_timeout
        self._worker: _Worker | None = None
        self._environment: dict[str, Any] = {}

    def judge(self, layout: Layout, folder: Path, emit: Emit) -> Verdict:
        try:
            worker = self._ready()
            deadline = None if self.timeout is None else time.monotonic() + self.timeout
            worker.send({"layout": layout.to_dict(), "folder": str(folder.resolve())})
            while True:
                message = worker.receive(deadline)
                if "verdict" in message:
                    verdict = Verdict(**message["verdict"])
                    if verdict.outcome in STICKY:
                        self.close()
                    return verdict
                emit(message)
        except TimeoutError:
            self.close()
            return self._killed("timeout", f"took longer than {self.timeout:g} s")
        except WorkerDiedError as error:
            self.close()
            return self._killed("crashed", str(error))
        except BaseException:
            self.close()
            raise

    def _killed(self, outcome: str, reason: str) -> Verdict:
        return Verdict(outcome=outcome, reason=reason, details={"environment": self._environment})

    def close(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def _ready(self) -> _Worker:
        if self._worker is None:
            self._worker = _Worker()
            try:
                self._worker.send(self.job.to_dict())
                answer = self._worker.receive(time.monotonic() + START_TIMEOUT)
            except (WorkerDiedError, TimeoutError) as error:
                raise WorkbenchError(f"no worker could be started: {error}") from None
            if "ready" not in answer:
                raise WorkbenchError(f"no worker could be started: {answer['failed']}")
            self._environment = answer["environment"]
        return self._worker


class _Worker:
    """The process and its two pipes, a JSON object a line."""

    def __init__(self) -> None:
        # A session of its own: Ctrl-C reaches only the parent, which then decides. -P: files of the
        # folder that the user stands in must not shadow modules.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "workbench.executors.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._input = self.process.stdin
        self._output = self.process.stdout
        self._buffer = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._output, selectors.EVENT_READ)

    def send(self, message: dict[str, Any]) -> None:
        try:
            self._input.write(json.dumps(message).encode() + b"\n")
            self._input.flush()
        except OSError:
            raise WorkerDiedError(self._how_it_died()) from None

    def receive(self, deadline: float | None) -> dict[str, Any]:
        """The next message.

        Raises:
            TimeoutError: none came before the deadline (on `time.monotonic`).
            WorkerDiedError: the process ended.
        """
        while b"\n" not in self._buffer:
            wait = None if deadline is None else deadline - time.monotonic()
            if wait is not None and (wait <= 0 or not self._selector.select(wait)):
                raise TimeoutError
            chunk = os.read(self._output.fileno(), 65536)
            if not chunk:
                raise WorkerDiedError(self._how_it_died())
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def _how_it_died(self) -> str:
        code = self.process.wait()
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (the system ran out of memory?)" if name == "SIGKILL" else ""
            return f"the worker was killed by {name}{hint}"
        return f"the worker exited with status {code}"

    def kill(self) -> None:
        self._selector.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._output.close()
        with contextlib.suppress(BrokenPipeError):  # what was buffered for a worker that is gone
            self._input.close()
