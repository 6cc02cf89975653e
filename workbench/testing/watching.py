"""A process that may end, crash or hang: its events as they come, and no orphan in any case."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from workbench.testing.blame import Frame
from workbench.testing.events import Event, Listener

EVENTS, STACK, OUTPUT, ERRORS = "events.jsonl", "stack.txt", "output.txt", "errors.txt"
POLL = 0.05  # seconds
DUMP_TIME = 2.0  # seconds for a hung process to write its stack
LAST_WORDS = 15  # lines
FAREWELL = 5.0  # seconds for a process that told all to clear up after itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class End:
    """How a process ended that had more to tell.

    Attributes:
        how: to follow "the process": `ended with status 3`; for a hang, `did not end within 5 s`.
        hung: it was killed because it had told nothing for too long.
        stack: what it was in, innermost first; empty if unknown.
    """

    how: str
    hung: bool = False
    stack: tuple[Frame, ...] = ()


class Watched:
    """Runs a command in a session of its own; leaving the context kills whatever is left of it.

    Ctrl-C reaches only the parent. The command's standard input ends when the parent does.

    Args:
        folder: for its files: `EVENTS`, its `STACK` at the end, `OUTPUT` and `ERRORS`.
    """

    def __init__(
        self, command: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> None:
        self.folder = folder
        for name in (EVENTS, STACK, OUTPUT, ERRORS):
            (folder / name).unlink(missing_ok=True)
        self._listener = Listener(folder / EVENTS)
        self._heard: deque[Event] = deque()
        with (folder / OUTPUT).open("wb") as output, (folder / ERRORS).open("wb") as errors:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # The group outlives its leader as long as a child of it does.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._listener.close()
        if self.process.stdin is not None:
            self.process.stdin.close()

    def next(self, limit: float) -> Event | End:
        """The next event, or how the process ended; after `limit` seconds that it hangs."""
        deadline = time.monotonic() + limit
        while True:
            is_over = self.process.poll() is not None  # asked first: what it told stays readable
            self._heard += self._listener.heard()
            if self._heard:
                return self._heard.popleft()
            if is_over:
                return End(how=_how(self.process.returncode), stack=self._stack())
            if time.monotonic() >= deadline:
                return End(how=f"did not end within {limit:g} s", hung=True, stack=self._dumped())
            time.sleep(POLL)

    def farewell(self) -> None:
        """Wait a little for a process that has told everything."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(FAREWELL)

    def text(self, name: str) -> str:
        """What it wrote to `OUTPUT` or `ERRORS`."""
        return (self.folder / name).read_text("utf-8", errors="replace")

    def last_words(self) -> str:
        """The end of what it wrote, to follow a message; empty if it wrote nothing."""
        lines = (self.text(OUTPUT) + self.text(ERRORS)).strip().splitlines()[-LAST_WORDS:]
        return "\n".join([". Its last words:", *lines]) if lines else ""

    def _dumped(self) -> tuple[Frame, ...]:
        """Where it hangs; it writes that when it is signalled, in C code too."""
        self.process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + DUMP_TIME
        while not self._stack() and time.monotonic() < deadline:
            time.sleep(POLL)
        time.sleep(POLL)  # the rest of the lines
        return self._stack()

    def _stack(self) -> tuple[Frame, ...]:
        path = self.folder / STACK
        text = path.read_text("utf-8", errors="replace") if path.exists() else ""
        return tuple(Frame.all_of(text))


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:  # a real-time signal
        name = str(-status)
    hint = " (the system ran out of memory?)" if name == "SIGKILL" else ""
    return f"ended with signal {name}{hint}"
