"""One worker process as its parent sees it: two pipes, a JSON object a line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from workbench.storage_url import public_environment


class WorkerDiedError(Exception):
    """The worker's process ended; the message says how."""


class WorkerProcess:
    """A process that runs `workbench.executors.worker`.

    Args:
        environment: variables that it gets beside this process's, whose storage it never learns.

    Attributes:
        facts: its environment for records, once it is ready.
        trial: the number of the trial that it judges, if any.
        deadline: when it must have answered, on `time.monotonic`; None for never.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        # A session of its own: Ctrl-C reaches only the parent, which then decides. -P: files of the
        # folder that the user stands in must not shadow modules.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "workbench.executors.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**public_environment(), **environment},
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._input = self.process.stdin
        self._output = self.process.stdout
        self._buffer = b""
        self.facts: dict[str, Any] | None = None
        self.trial: int | None = None
        self.deadline: float | None = None

    def fileno(self) -> int:
        """Of what it answers on, for selectors."""
        return self._output.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Ask something of it.

        Raises:
            WorkerDiedError: the process ended.
        """
        try:
            self._input.write(json.dumps(message).encode() + b"\n")
            self._input.flush()
        except OSError:
            raise WorkerDiedError(self._how_it_died()) from None

    def receive(self) -> list[dict[str, Any]]:
        """What it has answered; blocks for a first piece, which may be less than a message.

        Raises:
            WorkerDiedError: the process ended.
        """
        chunk = os.read(self.fileno(), 65536)
        if not chunk:
            raise WorkerDiedError(self._how_it_died())
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        return [json.loads(line) for line in lines]

    def _how_it_died(self) -> str:
        code = self.process.wait()
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (the system ran out of memory?)" if name == "SIGKILL" else ""
            return f"the worker was killed by {name}{hint}"
        return f"the worker exited with status {code}"

    def interrupt(self) -> None:
        """End it and all that it started; its pipes stay as they are."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """End it and all that it started."""
        self.process.poll()
        self.interrupt()
        self.process.wait()
        self._output.close()
        with contextlib.suppress(BrokenPipeError):  # what was buffered for a worker that is gone
            self._input.close()
