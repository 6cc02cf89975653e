"""A watched process: its events, how it ended, and that nothing of it is left."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.workbench.testing.running import gone
from workbench.testing.events import Listener
from workbench.testing.watching import ERRORS, EVENTS, OUTPUT, End, Watched

HEADER = """
import ctypes, faulthandler, os, signal, subprocess, sys, time
folder = sys.argv[1]
def tell(text):
    with open(folder + "/events.jsonl", "a") as file:
        file.write(text)
stack = open(folder + "/stack.txt", "w")
faulthandler.enable(stack, all_threads=False)
faulthandler.register(signal.SIGUSR1, stack, all_threads=False)
"""


@pytest.fixture
def watch(tmp_path: Path) -> Callable[[str], Watched]:
    def start(body: str) -> Watched:
        (tmp_path / "body.py").write_text(HEADER + textwrap.dedent(body))
        command = [sys.executable, str(tmp_path / "body.py"), str(tmp_path)]
        return Watched(command, tmp_path, os.environ)

    return start


def test_events_come_in_order_and_survive_the_end(watch: Callable[[str], Watched]) -> None:
    body = """
    for number in range(3):
        tell('{"event": "number", "number": %d}\\n' % number)
    print("said", flush=True)
    print("complained", file=sys.stderr)
    os._exit(7)
    """
    with watch(body) as process:
        heard = [process.next(60) for _ in range(4)]
        assert heard[:3] == [{"event": "number", "number": number} for number in range(3)]
        assert heard[3] == End(how="ended with status 7")
        assert process.text(ERRORS) == "complained\n"
        assert process.text(OUTPUT) == "said\n"


def test_half_a_line_is_no_event(tmp_path: Path) -> None:
    listener = Listener(tmp_path / EVENTS)
    with (tmp_path / EVENTS).open("a") as file:
        for text, heard in (
            ('{"event": ', []),
            ('"one"}\n{"ev', [{"event": "one"}]),
            ('ent": "two"}\n{"event": "three"}\n', [{"event": "two"}, {"event": "three"}]),
            ("", []),
        ):
            file.write(text)
            file.flush()
            assert listener.heard() == heard
    listener.close()


@pytest.mark.parametrize(
    ("body", "how"),
    [
        ("sys.exit(0)", "ended with status 0"),
        ("raise ValueError", "ended with status 1"),
        ("os.kill(os.getpid(), signal.SIGTERM)", "ended with signal SIGTERM"),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            "ended with signal SIGKILL (the system ran out of memory?)",
        ),
        ("os.kill(os.getpid(), signal.SIGRTMIN + 1)", f"ended with signal {signal.SIGRTMIN + 1}"),
    ],
)
def test_it_says_how_the_process_ended(
    watch: Callable[[str], Watched], body: str, how: str
) -> None:
    with watch(body) as process:
        assert process.next(60) == End(how=how)


def test_a_crash_says_where(watch: Callable[[str], Watched], tmp_path: Path) -> None:
    body = """
    def read():
        ctypes.string_at(0)
    read()
    """
    with watch(body) as process:
        end = process.next(60)
    assert isinstance(end, End)
    assert end.how == "ended with signal SIGSEGV"
    (frame,) = [frame for frame in end.stack if frame.name == "read"]
    lines = (tmp_path / "body.py").read_text().splitlines()
    assert frame.file == str(tmp_path / "body.py")
    assert "string_at(0)" in lines[frame.line - 1]


def test_a_hang_ends_with_all_its_children(watch: Callable[[str], Watched]) -> None:
    body = """
    child = subprocess.Popen(["sleep", "600"])
    tell('{"event": "begun", "pids": [%d, %d]}\\n' % (os.getpid(), child.pid))
    def wait():
        while True:
            pass
    wait()
    """
    with watch(body) as process:
        begun = process.next(60)
        assert not isinstance(begun, End)
        end = process.next(0.3)
    assert isinstance(end, End)
    assert (end.how, end.hung) == ("did not end within 0.3 s", True)
    assert "wait" in [frame.name for frame in end.stack]
    assert all(map(gone, begun["pids"]))


@pytest.mark.parametrize("body", ["time.sleep(600)", "sys.exit()"])
def test_leaving_kills_what_is_left(watch: Callable[[str], Watched], body: str) -> None:
    """Also children of a process that has ended."""
    start = """
    child = subprocess.Popen(["sleep", "600"])
    tell('{"event": "begun", "pids": [%d, %d]}\\n' % (os.getpid(), child.pid))
    """
    with watch(f"{start}{body}\n") as process:
        begun = process.next(60)
    assert not isinstance(begun, End)
    assert all(map(gone, begun["pids"]))
