"""Keeps what plugins print out of the results: standard output is for those alone."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, TextIO

OURS = frozenset({"workbench", "torch", "pluggy", "contextlib", "runpy"}) | sys.stdlib_module_names

_named: set[str] = set()  # who was named already in this process
_results: list[TextIO] = []  # where results go while standard output is not theirs


def named() -> frozenset[str]:
    """Who printed to standard output in this process, where that is for results."""
    return frozenset(_named)


def results() -> TextIO:
    """The stream for a command's results: standard output, wherever `sys.stdout` points now."""
    return _results[-1] if _results else sys.stdout


@contextlib.contextmanager
def apart(who: str | None = None) -> Iterator[None]:
    """Inside, what is printed goes to standard error, and a line there says once who printed.

    Also what is written to the descriptor, by C code or a child process.

    Args:
        who: runs inside, for that line; the module that prints, if None.
    """
    sys.stdout.flush()
    stray = _Stray(who)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_kept_results())
        stack.enter_context(contextlib.redirect_stdout(stray))
        yield


@contextlib.contextmanager
def _kept_results() -> Iterator[None]:
    """A stream to the present standard output; its descriptor goes to standard error."""
    try:
        is_descriptor = sys.stdout.fileno() == 1
        saved = os.dup(1)
        os.dup2(2, 1)
    except (OSError, ValueError):  # closed, or replaced by something without one
        with _pushed(results()):
            yield
        return
    stream = results()
    if is_descriptor and not _results:
        encoding, errors = sys.stdout.encoding, sys.stdout.errors
        stream = open(saved, "w", encoding=encoding, errors=errors, closefd=False)  # noqa: SIM115
    try:
        with _pushed(stream):
            yield
        if stream is not sys.stdout:
            stream.flush()
    finally:
        os.dup2(saved, 1)
        os.close(saved)


@contextlib.contextmanager
def _pushed(stream: TextIO) -> Iterator[None]:
    _results.append(stream)
    try:
        yield
    finally:
        _results.pop()


class _Stray(io.TextIOBase):
    """Standard output for those who should not use it."""

    def __init__(self, who: str | None) -> None:
        self._who = who

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return sys.stderr.isatty()

    def fileno(self) -> int:
        return sys.stderr.fileno()

    @property
    def buffer(self) -> Any:
        return sys.stderr.buffer

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return sys.stderr.encoding

    def write(self, text: str) -> int:
        who = self._who or _printing_module()
        if who not in _named:
            _named.add(who)
            sys.stderr.write(
                f"note: {who} prints to standard output, which is for results; "
                "it is shown here instead:\n"
            )
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def _printing_module() -> str:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] not in OURS:
            return f"module {name}"
        frame = frame.f_back
    return "something"
