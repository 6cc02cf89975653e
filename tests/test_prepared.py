"""A process forked from a prepared interpreter is what a new one would be, and ends as one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from tests.prepared import Checks, Forked, Interpreter
from workbench.testing import watching

Start = Callable[[list[str], dict[str, str]], Any]

TELLS = """
import atexit, gc, json, os, signal, sys, tempfile, threading

def told(stream):
    return [stream.encoding, stream.errors, stream.line_buffering, stream.fileno()]

import __main__
with os.popen("env") as printed:
    inherited = printed.read().splitlines()
numbers = set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}
print(json.dumps({
    "arguments": sys.argv,
    "path": sys.path,
    "flags": str(sys.flags),
    "main": [__name__, globals().get("__file__"), __spec__ and __spec__.name],
    "is main": __main__.__dict__ is globals(),
    "environment": dict(os.environ),
    "to its children": sorted(inherited),
    "folder": os.getcwd(),
    "temporary": tempfile.gettempdir(),
    "leads a session": os.getsid(0) == os.getpid(),
    "streams": [told(stream) for stream in (sys.stdin, sys.stdout, sys.stderr)],
    "read": sys.stdin.read(),
    "open": sorted(n for n in range(64) if os.path.exists(f"/proc/self/fd/{n}")),
    "signals": sorted((n, str(signal.getsignal(n))) for n in numbers),
    "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    "threads": [thread.name for thread in threading.enumerate()],
    "garbage": [gc.isenabled(), gc.get_threshold()],
    "imported": "tells" in sys.modules,
}))
atexit.register(print, "ended in order")
"""
ENDS = {
    "returns": "pass",
    "a status": "sys.exit(3)",
    "no status": "sys.exit()",
    "words": "sys.exit('words')",
    "at once": "os._exit(4)",
    "an error": "raise ValueError('planted')",
    "a crash": "ctypes.string_at(0)",
    "Ctrl-C": "raise KeyboardInterrupt",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "a real-time signal": "os.kill(os.getpid(), signal.SIGRTMIN + 1)",
    "an error at exit": "atexit.register(lambda: 1 / 0)",
    "a thread that goes on": "threading.Timer(0.2, print, ['late']).start()",
}


@pytest.fixture(scope="module", params=["-P -m", "-P -c", "-P", "-I"])
def way(request: pytest.FixtureRequest) -> str:
    """How Python is started: with a module of PYTHONPATH, with code, or with a script."""
    return str(request.param)


@pytest.fixture(scope="module")
def interpreter(way: str) -> Iterator[Interpreter]:
    made = Interpreter(way.split()[0], ("numpy",))
    yield made
    made.close()


def both(
    interpreter: Interpreter, way: str, code: str, folder: Path, **environment: str
) -> list[tuple[int, str, str]]:
    """Status and words of a new process and of a forked one."""
    file = folder / "tells.py"
    file.write_text(code)
    option, *kind = way.split()
    what = {"-m": ["-m", "tells"], "-c": ["-c", code]}.get("".join(kind), [str(file)])
    command = [sys.executable, option, *what, "a", "-b"]
    variables = {**os.environ, "PYTHONPATH": str(folder), **environment}
    found = []
    for begun in ("new", "forked"):
        question = folder / "question"
        question.write_text("a question\n")
        paths = [folder / f"{begun}-{name}" for name in ("out", "err")]
        with question.open("rb") as read, paths[0].open("wb") as out, paths[1].open("wb") as err:
            process = _start(begun, interpreter, command, variables, (read, out, err))
            status = process.wait(60)
        found.append((status, *(path.read_text() for path in paths)))
    return found


def _start(
    kind: str,
    interpreter: Interpreter,
    command: list[str],
    variables: dict[str, str],
    files: tuple[IO[bytes], IO[bytes], IO[bytes]],
) -> Forked | subprocess.Popen[bytes]:
    if kind == "forked":
        read, out, err = (file.fileno() for file in files)
        return interpreter.start(command, variables, (read, out, err), session=True)
    read, out, err = files
    return subprocess.Popen(
        command, env=variables, stdin=read, stdout=out, stderr=err, start_new_session=True
    )


def test_its_surroundings_are_those_of_a_new_one(
    interpreter: Interpreter, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after another, in different folders and with different variables."""
    for name in ("first", "second"):
        folder = tmp_path / name
        (folder / "temporary").mkdir(parents=True)
        monkeypatch.chdir(folder)
        changes = {"TMPDIR": str(folder / "temporary"), name: "is here"}
        new, forked = both(interpreter, way, TELLS, folder, **changes)
        assert (new[0], new[2]) == (0, "")
        assert new[1].endswith("\nended in order\n")
        expected, found = (json.loads(out.partition("\n")[0]) for _, out, _ in (new, forked))
        assert found == expected
        assert forked[1].endswith("\nended in order\n")
        assert (forked[0], forked[2]) == (0, "")
        assert expected["read"] == "a question\n"
        assert expected["folder"] == str(folder)


@pytest.mark.parametrize("way", ["-P -m", "-I"], indirect=True)
@pytest.mark.parametrize("code", ENDS.values(), ids=ENDS.keys())
def test_it_ends_as_a_new_one(
    interpreter: Interpreter, way: str, code: str, tmp_path: Path
) -> None:
    imports = "import atexit, ctypes, os, signal, sys, threading, time\n"
    said = "print('out')\nprint('err', file=sys.stderr)\n"
    new, forked = both(interpreter, way, f"{imports}{said}{code}\n", tmp_path)
    assert forked[:2] == new[:2]
    # Its traceback has frames of ours.
    assert forked[2].splitlines()[:1] == new[2].splitlines()[:1]
    assert forked[2].splitlines()[-1:] == new[2].splitlines()[-1:]


HIDDEN = """
import importlib.util, sys
print("numpy" in sys.modules, importlib.util.find_spec("numpy").origin)
before = set(sys.modules)
import numpy.linalg as linalg
print(sys.modules["numpy.linalg"] is linalg, linalg.norm([3.0, 4.0]))
print(sorted(name for name in set(sys.modules) - before if name.startswith("numpy")))
spec = sys.modules["numpy"].__spec__
print(spec.name, spec.origin, type(spec.loader).__name__, spec.submodule_search_locations)
from numpy import testing
print(len(sys.meta_path), testing.__name__)
"""


def test_a_hidden_package_is_imported_by_who_imports_it(tmp_path: Path) -> None:
    interpreter = Interpreter("-P", ("numpy",), hidden=("numpy",))
    for code in (HIDDEN, f"import sys\nsys.modules['numpy'] = None\n{HIDDEN}"):
        new, forked = both(interpreter, "-P -c", code, tmp_path)
        assert forked[:2] == new[:2]
        assert forked[2].splitlines()[-1:] == new[2].splitlines()[-1:]
    interpreter.close()


def test_variables_that_are_read_early_begin_another(tmp_path: Path) -> None:
    interpreter = Interpreter("-P", ())
    code = "import os, sys\nprint(os.getppid(), sys.flags.dont_write_bytecode, hash('a'))\n"
    found = []
    for seed in ("1", "1", "2"):
        changes = {"PYTHONHASHSEED": seed, "PYTHONDONTWRITEBYTECODE": "1"}
        new, forked = both(interpreter, "-P", code, tmp_path, **changes)
        assert forked[1].split()[1:] == new[1].split()[1:]
        found.append(forked[1].split()[0])
    assert found[0] == found[1] != found[2]
    interpreter.close()


def test_a_hang_is_seen_and_ended(tmp_path: Path) -> None:
    interpreter = Interpreter("-P", ())
    file = tmp_path / "hangs.py"
    file.write_text("import time\nprint('begun', flush=True)\ntime.sleep(600)\n")
    out = tmp_path / "out"
    with out.open("wb") as words, open(os.devnull, "rb") as nothing:
        streams = (nothing.fileno(), words.fileno(), words.fileno())
        command = [sys.executable, "-P", str(file)]
        process = interpreter.start(command, os.environ, streams, session=False)
    while out.read_text() != "begun\n":
        assert process.poll() is None
        time.sleep(0.01)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.05)
    with pytest.raises(AssertionError, match="one at a time"):
        interpreter.start(command, os.environ, streams, session=False)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == -signal.SIGTERM
    interpreter.close()


def test_plugins_are_checked_in_a_process_of_a_prepared_interpreter(checks: Checks) -> None:
    assert vars(watching)["subprocess"] is checks
