"""Fresh Python processes that need not import again for seconds what no test is about.

Exports are proved in fresh processes: here forked from one that has imported torch and
transformers, and nothing else that an export needs. Workers are forked from a source that each
study starts: here studies share one. Tests that run `workbench` as a process start real ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from workbench.executors.worker_process import ForkSource

SOURCE = Path(__file__).with_name("prepared_source.py")


class Prepared:
    """Stands in for the module `subprocess` where exports are proved: scripts run with -I.

    Args:
        folder: for what it writes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._source: subprocess.Popen[str] | None = None

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
        python, isolated, script, *arguments = map(str, command)
        assert (python, isolated) == (sys.executable, "-I")
        assert (capture_output, text, check) == (True, True, False)
        assert {"HF_HOME", "HF_HUB_OFFLINE"} <= env.keys()  # or it would use its user's
        out, err = self._folder / "out", self._folder / "err"
        asked = {
            "script": script,
            "arguments": arguments,
            "environment": dict(env),
            "folder": os.getcwd(),
            "out": str(out),
            "err": str(err),
        }
        with self._lock:
            if self._source is None or self._source.poll() is not None:
                self._source = self._start()
            source = self._source
            assert source.stdin is not None
            assert source.stdout is not None
            source.stdin.write(json.dumps(asked) + "\n")
            source.stdin.flush()
            answer = source.stdout.readline()
            assert answer, f"the prepared interpreter ended with status {source.wait()}"
            status = int(answer)
            return subprocess.CompletedProcess(command, status, out.read_text(), err.read_text())

    def _start(self) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "HF_HOME": str(self._folder / "hf"),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        environment.pop("HF_MODULES_CACHE", None)
        return subprocess.Popen(
            [sys.executable, "-I", str(SOURCE)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """End the interpreter."""
        if self._source is not None:
            with self._source:  # closes its input, and waits
                pass


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
