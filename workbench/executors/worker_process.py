"""One worker process as its parent sees it: two pipes, a JSON object a line.

A worker on the CPU of a Linux machine is forked from a `ForkSource`; any other starts by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import IO, Any

from workbench.executors.worker_source import INT
from workbench.storage_url import public_environment


class WorkerDiedError(Exception):
    """The worker's process ended; the message says how."""


class ForkSource:
    """A process with torch imported, that workers are forked from (`worker_source`).

    Attributes:
        is_ready: whether a worker was forked from it.
    """

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self.process = _start("worker_source", {}, stdin=theirs, stdout=subprocess.DEVNULL)
        self.is_ready = False

    def fork(self, *descriptors: int) -> None:
        """Have a worker made of standard input, standard output and link.

        Where the source is gone, so is the other side of the link.
        """
        with contextlib.suppress(BrokenPipeError):
            socket.send_fds(self._control, [b"+"], descriptors)

    def close(self) -> None:
        """End it, and all workers with it."""
        self._control.close()
        if not self.is_ready:  # it would see that only after its imports
            self.process.kill()
        self.process.wait()


class Forked:
    """A worker made by a source, with as much of `subprocess.Popen` as is needed.

    Attributes:
        returncode: None until it is known to have ended.
    """

    def __init__(self, source: ForkSource) -> None:
        self._source = source
        self._reading = threading.Lock()
        self._said = b""
        self._link, link = socket.socketpair()
        requests, to_it = os.pipe()
        from_it, answers = os.pipe()
        with link:
            source.fork(requests, answers, link.fileno())
        os.close(requests)
        os.close(answers)
        self.stdin: IO[bytes] = os.fdopen(to_it, "wb")
        self.stdout: IO[bytes] = os.fdopen(from_it, "rb")
        self.returncode: int | None = None

    @property
    def pid(self) -> int:
        """Blocks until the source has forked it.

        Raises:
            ProcessLookupError: it was never forked.
        """
        while not self.is_forked and self.returncode is None:
            self._hear(0)
        if not self.is_forked:
            raise ProcessLookupError
        return int(INT.unpack_from(self._said)[0])

    @property
    def is_forked(self) -> bool:
        """False before that: then it ends with its link, as soon as it is there."""
        return len(self._said) >= INT.size

    def poll(self) -> int | None:
        if self.returncode is None:
            self._hear(socket.MSG_DONTWAIT)
        return self.returncode

    def wait(self) -> int:
        while self.returncode is None:
            self._hear(0)
        return self.returncode

    def release(self) -> None:
        """Have the source end what is left of it, and forget its id."""
        self._link.close()

    def _hear(self, flags: int) -> None:
        with self._reading:
            if len(self._said) == 2 * INT.size:
                return
            try:
                said = self._link.recv(2 * INT.size - len(self._said), flags)
            except BlockingIOError:
                return
            self._said += said
            self._source.is_ready = self._source.is_ready or bool(said)
            if len(self._said) == 2 * INT.size:
                self.returncode = int(INT.unpack_from(self._said, INT.size)[0])
            elif not said:  # the source is gone
                self._kill_orphan()
                self.returncode = self._source.process.wait()

    def _kill_orphan(self) -> None:
        if self.is_forked:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(INT.unpack_from(self._said)[0], signal.SIGKILL)


def _start(module: str, environment: Mapping[str, str], **streams: Any) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C reaches only the parent, which then decides. -P: files of the
    # folder that the user stands in must not shadow modules.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", f"workbench.executors.{module}"],
        env={**public_environment(), **environment},
        start_new_session=True,
        **streams,
    )


class WorkerProcess:
    """A process that runs `workbench.executors.worker`.

    Args:
        environment: variables that it gets beside this process's, whose storage it never learns.
        source: forks it; None starts it by itself.

    Attributes:
        facts: its environment for records, once it is ready.
        trial: the number of the trial that it judges, if any.
        deadline: when it must have answered, on `time.monotonic`; None for never.
    """

    def __init__(self, environment: Mapping[str, str], source: ForkSource | None = None) -> None:
        self.process: Forked | subprocess.Popen[bytes]
        if source is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.process = _start("worker", environment, **pipes)
        else:
            assert not environment, "a forked worker has the variables of its source"
            self.process = Forked(source)
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
        if not isinstance(self.process, Forked) or self.process.is_forked:
            self.interrupt()
            self.process.wait()
        self._output.close()
        with contextlib.suppress(BrokenPipeError):  # what was buffered for a worker that is gone
            self._input.close()
        if isinstance(self.process, Forked):
            self.process.release()
