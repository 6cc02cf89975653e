"""Ctrl-C: while nothing is at stake it ends the process on the spot, else work is put away first.

Python raises KeyboardInterrupt wherever it happens to be; in the middle of an import that becomes
a traceback, an ImportError of something innocent, or nothing at all. So it is raised only where
code is ready for it: inside `raised` and `explained`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STATUS = 128 + signal.SIGINT  # as shells report it


def leave_at_once() -> None:
    """From now on Ctrl-C ends the process on the spot, unless its caller ignores it (nohup)."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


@contextmanager
def raised() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt."""
    leaving = signal.getsignal(signal.SIGINT) is _leave
    if leaving:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if leaving:
            signal.signal(signal.SIGINT, _leave)


@contextmanager
def ignored() -> Iterator[None]:
    """Inside, Ctrl-C does nothing, here and in the processes started here until they handle it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def explained(advice: str) -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt; it ends the command with a line of advice.

    Raises:
        SystemExit: with the status that shells expect.
    """
    with raised():
        try:
            yield
        except KeyboardInterrupt:
            leave_at_once()  # whoever presses it again wants no more words
            print(f"\ninterrupted. {advice}", file=sys.stderr)
            raise SystemExit(STATUS) from None


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"\ninterrupted.\n")
    os._exit(STATUS)
