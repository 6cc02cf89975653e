"""Fresh Python processes that need not import again for seconds what no test is about.

Exports are proved, and plugins checked, in fresh processes: here each is forked from one that has
imported what all of them import first, torch above all. Workers are forked from a source that each
study starts: here studies share one. Tests that run `workbench` as a process start real ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from tests.prepared_source import INT
from workbench.executors.worker_process import ForkSource

SOURCE = Path(__file__).with_name("prepared_source.py")
# Nothing else that an export needs.
PROVING = (
    "torch",
    "transformers.modeling_utils",
    "transformers.models.auto.configuration_auto",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.generation",
)
# What the process imports before any plugin, and what pytest's plugins here import before a test:
# not the suites, whose asserts pytest has yet to rewrite.
CHECKING = (
    "workbench.builder",
    "workbench.testing.subject",
    "workbench.testing.watching",
    "pytest",
    "hypothesis.internal.observability",
)
# Variables that Python and libraries read as they begin, and what is forked then does not.
READ_EARLY = re.compile(
    "PYTHON(?!PATH$)|CUDA_|LD_|OMP_|MKL_|KMP_|OPENBLAS_|TORCH|PYTORCH_|LC_|LANG"
)


class Interpreter:
    """An interpreter that has imported modules; processes are forked from it, one at a time.

    It begins with the first of them, and again where one has other variables that count then.

    Args:
        option: of the interpreter, and so of all that is forked from it: `-I` or `-P`.
        modules: what it imports.
        settled: variables that it begins with, whatever those of a process say.
        hidden: packages among what it imports that no process has imported until it does.
    """

    def __init__(
        self,
        option: str,
        modules: Sequence[str],
        settled: Mapping[str, str] | None = None,
        hidden: Sequence[str] = (),
    ) -> None:
        self._command = [sys.executable, option, str(SOURCE), *modules, "--", *hidden]
        self._settled = dict(settled or {})
        self._early: dict[str, str] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._last: Forked | None = None

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        streams: tuple[int, int, int],
        *,
        session: bool,
    ) -> Forked:
        """A process that runs a command of this interpreter, in the folder of the caller.

        Args:
            streams: its standard input, output and error.
            session: whether it leads a session of its own.
        """
        assert list(command[:2]) == self._command[:2]
        assert self._last is None or self._last.poll() is not None, "one at a time"
        asked = {
            "command": list(command[2:]),
            "environment": dict(environment),
            "folder": os.getcwd(),
            "session": session,
        }
        line = json.dumps(asked).encode() + b"\n"
        control = self._begun({**environment, **self._settled})
        sent = socket.send_fds(control, [line], streams)
        control.sendall(line[sent:])
        self._last = Forked(command, control)
        return self._last

    def run(
        self, command: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """A process that has ended: nothing to read, its words captured as text."""
        with (
            open(os.devnull) as nothing,
            tempfile.TemporaryFile("w+") as out,
            tempfile.TemporaryFile("w+") as err,
        ):
            streams = (nothing.fileno(), out.fileno(), err.fileno())
            status = self.start(command, environment, streams, session=False).wait()
            for file in (out, err):
                file.seek(0)
            return subprocess.CompletedProcess(command, status, out.read(), err.read())

    def _begun(self, environment: dict[str, str]) -> socket.socket:
        early = {name: value for name, value in environment.items() if READ_EARLY.match(name)}
        is_there = self._process is not None and self._process.poll() is None
        if self._control is None or not is_there or early != self._early:
            self.close()
            self._early = early
            self._control, theirs = socket.socketpair()
            with theirs:
                self._process = subprocess.Popen(
                    self._command,
                    env=environment,
                    stdin=theirs,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                )
        return self._control

    def close(self) -> None:
        """End it, once what was forked last has ended."""
        if self._control is not None and self._process is not None:
            self._control.close()
            self._process.wait()
            self._control = self._process = self._last = None


class Forked:
    """A process forked from an interpreter, with as much of `subprocess.Popen` as is needed.

    Attributes:
        stdin: what is written there, it reads; None where it was given what to read.
    """

    def __init__(self, command: Sequence[str], control: socket.socket) -> None:
        self._command, self._control = command, control
        self.stdin: IO[bytes] | None = None
        self.returncode: int | None = None
        self.pid = self._hear()

    def _hear(self) -> int:
        said = self._control.recv(INT.size, socket.MSG_WAITALL)
        assert said, "the prepared interpreter has ended"
        return int(INT.unpack(said)[0])

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if timeout is not None and not select.select([self._control], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self._command, timeout)
            self.returncode = self._hear()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Proofs:
    """Stands in for the module `subprocess` where exports are proved: scripts run with -I.

    What a script's own variables say of Hugging Face's folders comes too late.

    Args:
        folder: for what it writes.
    """

    def __init__(self, folder: Path) -> None:
        self._home, self._lock = folder / "hf", threading.Lock()
        settled = {
            "HF_HOME": str(self._home),
            "HF_MODULES_CACHE": str(self._home / "modules"),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self._interpreter = Interpreter("-I", PROVING, settled)

    def run(
        self,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str],
        capture_output: bool,
        text: bool,
        check: bool,
    ) -> subprocess.CompletedProcess[str]:
        """`subprocess.run` of `python -I script arguments…`, its words captured as text."""
        assert (capture_output, text, check) == (True, True, False)
        assert {"HF_HOME", "HF_HUB_OFFLINE"} <= env.keys()  # or it would use its user's
        with self._lock:
            shutil.rmtree(self._home, ignore_errors=True)
            return self._interpreter.run(list(map(str, command)), env)

    def close(self) -> None:
        """End the interpreter."""
        self._interpreter.close()


class Checks:
    """Stands in for the module `subprocess` where processes are watched: those that check plugins.

    All others are started by themselves.
    """

    PIPE, TimeoutExpired = subprocess.PIPE, subprocess.TimeoutExpired

    def __init__(self) -> None:
        self._interpreter = Interpreter("-P", CHECKING)

    def Popen(  # noqa: N802
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        stdin: int,
        stdout: IO[bytes],
        stderr: IO[bytes],
        start_new_session: bool,
    ) -> Forked | subprocess.Popen[bytes]:
        """`subprocess.Popen` of `python -P -m module arguments…`, which reads from a pipe."""
        if list(command[:4]) != [sys.executable, "-P", "-m", "workbench.testing.check_process"]:
            return subprocess.Popen(
                command,
                env=env,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                start_new_session=start_new_session,
            )
        assert stdin == subprocess.PIPE
        reading, writing = os.pipe()
        try:
            streams = (reading, stdout.fileno(), stderr.fileno())
            process = self._interpreter.start(command, env, streams, session=start_new_session)
        finally:
            os.close(reading)
        process.stdin = os.fdopen(writing, "wb")
        return process

    def close(self) -> None:
        """End the interpreter."""
        self._interpreter.close()


class Sources:
    """Stands in for `ForkSource`: hands the one that is there to study after study.

    A worker has the environment and the folder of its source, so where these differ it is another.
    """

    def __init__(self) -> None:
        self._surroundings: tuple[object, ...] = ()
        self._source: Lent | None = None

    def __call__(self) -> Lent:
        surroundings = (os.getcwd(), {**os.environ, "PYTEST_CURRENT_TEST": ""})
        if (
            self._source is None
            or self._source.process.poll() is not None
            or surroundings != self._surroundings
        ):
            self.close()
            self._source, self._surroundings = Lent(), surroundings
        self._source.users += 1
        return self._source

    def close(self) -> None:
        """End the source, or leave that to the last study that uses it."""
        if self._source is not None:
            self._source.is_kept = False
            self._source.end_if_unused()
            self._source = None


class Lent(ForkSource):
    """A source that outlives the studies that close it."""

    users, is_kept = 0, True

    def close(self) -> None:
        """End it if nobody has a use for it; the workers of who closes it have ended before."""
        self.users -= 1
        self.end_if_unused()

    def end_if_unused(self) -> None:
        if not self.users and not self.is_kept:
            super().close()
