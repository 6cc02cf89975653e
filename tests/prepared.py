"""Fresh Python processes that need not import torch and transformers again.

Exports are proved in fresh processes, which import for seconds what no test is about. Here they are
forked from one that has imported these two packages, and nothing else that an export needs. The
tests that run `workbench` itself as a process start real ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("prepared_source.py")


class Prepared:
    """Stands in for the module `subprocess`, for scripts in an interpreter of their own (-I).

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
        env: Mapping[str, str] | None = None,
        capture_output: bool,
        text: bool,
        check: bool,
    ) -> subprocess.CompletedProcess[str]:
        """`subprocess.run` of `python -I script arguments…`, its words captured as text."""
        python, isolated, script, *arguments = map(str, command)
        assert (python, isolated) == (sys.executable, "-I")
        assert (capture_output, text, check) == (True, True, False)
        out, err = self._folder / "out", self._folder / "err"
        asked = {
            "script": script,
            "arguments": arguments,
            "environment": dict(os.environ if env is None else env),
            "folder": os.getcwd(),
            "out": str(out),
            "err": str(err),
        }
        with self._lock:
            source = self._source = self._source or self._start()
            assert source.stdin is not None
            assert source.stdout is not None
            source.stdin.write(json.dumps(asked) + "\n")
            source.stdin.flush()
            status = int(source.stdout.readline())
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
