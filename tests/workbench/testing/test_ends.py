"""Code that ends the process which checks it, or hangs: reported, and all else is checked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.workbench.testing.planting import Edit, edited
from tests.workbench.testing.running import gone
from workbench.errors import WorkbenchError
from workbench.testing import checking
from workbench.testing.checking import Report, check_package
from workbench.testing.subject import Check

COMMAND = str(Path(sys.executable).with_name("workbench"))
BEGIN = "        length, past ="
METHODS = "    @classmethod\n    def costs(\n"
REGISTER = '    register("good", Good)\n'
TOP = "@dataclasses.dataclass\nclass Last"
EXIT = "__import__('os')._exit(3)"
SEGFAULT = "__import__('ctypes').string_at(0)"


def in_forward(line: str) -> Edit:
    return BEGIN, f"        {line}\n{BEGIN}"


def in_step(body: str) -> Edit:
    step = f"    def step(self, x_BD, state, context=PLAIN):\n        {body}\n\n"
    return METHODS, step + METHODS


def at_import(line: str) -> Edit:
    return TOP, f"{line}\n\n\n{TOP}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "layers").mkdir()
    return tmp_path / "layers" / "bad.py"


def checked(path: Path, *edits: Edit, only: Iterable[str] = (), timeout: float = 60.0) -> Report:
    """The report of a layer with these edits, on the checks with these names."""
    path.write_text(edited("layer", *edits), encoding="utf-8")
    folders = [str(path.parent)]
    return check_package(
        path.stem, plugin_dirs=folders, only=" or ".join(only) or None, timeout=timeout
    )


def outcomes(report: Report) -> dict[str, list[str]]:
    """By check, of each of its configs."""
    found: dict[str, list[str]] = {}
    for check in report.checks:
        found.setdefault(check.check, []).append(check.outcome)
    return found


def failure(report: Report) -> Check:
    """The one check that failed."""
    (failed,) = [check for check in report.checks if check.outcome == "failed"]
    return failed


def line_of(path: Path, text: str) -> int:
    (number,) = [i for i, line in enumerate(path.read_text().splitlines(), 1) if text in line]
    return number


@pytest.mark.parametrize(
    ("line", "how"),
    [
        (EXIT, "the process ended with status 3 during this check"),
        (SEGFAULT, "the process ended with signal SIGSEGV during this check"),
        (
            "raise KeyboardInterrupt",
            "the process was interrupted from inside (KeyboardInterrupt, pytest.exit) "
            "during this check",
        ),
    ],
)
def test_the_check_that_ends_the_process_failed_and_the_others_run(
    path: Path, line: str, how: str
) -> None:
    only = ("class_attributes", "causality", "costs_count_parameters", "save_and_load")
    report = checked(
        path, in_forward(f"if len(x_BTD) == 2 and x_BTD.shape[1] == 33: {line}"), only=only
    )
    assert outcomes(report) == {
        "class_attributes": ["passed"],
        "costs_count_parameters": ["passed", "passed"],
        "save_and_load": ["passed", "passed"],
        "causality": ["failed", "skipped"],
    }
    failed = failure(report)
    assert failed.message == how
    assert failed.case == "defaults"
    assert failed.file == str(path)
    if "Interrupt" not in line:  # of which no stack is left
        assert failed.line == line_of(path, line)
    assert "os._exit" in failed.mend
    assert report.checks[-1].message.startswith("not run: another config of the check ended")


@pytest.mark.slow
def test_a_hang_is_the_failure_of_its_check(path: Path) -> None:
    body = "while True:\n            pass"
    only = ("causality", "steps_continue", "gradients")
    report = checked(path, in_step(body), only=only, timeout=8.0)
    assert outcomes(report) == {
        "gradients": ["passed", "passed"],
        "causality": ["passed", "passed"],
        "steps_continue_a_prefill": ["failed", "skipped"],
    }
    failed = failure(report)
    assert failed.message == "did not end within 8 s"
    assert failed.line in (line_of(path, "while True"), line_of(path, "            pass"))
    assert 8.0 <= failed.seconds < 16.0
    assert "--timeout" in failed.mend


def test_what_has_nothing_to_do_with_it_runs_when_patience_is_at_its_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "PATIENCE", 0.0)
    only = ("steps_continue", "prefill_and_steps", "gradients", "costs_count_parameters")
    report = checked(path, in_step(EXIT), only=only)
    # The member is known, so that what concerns `forward` alone is not given up.
    assert outcomes(report) == {
        "costs_count_parameters": ["passed", "passed"],
        "gradients": ["passed", "passed"],
        "prefill_and_steps_equal_forward": ["failed", "skipped"],
        "steps_continue_a_prefill": ["skipped", "skipped"],
    }
    reasons = {check.message for check in report.checks if check.outcome == "skipped"}
    assert "not run: checks like it ended the process or hung (1 so far)" in reasons


@pytest.mark.usefixtures("own_interpreters")
def test_a_thing_that_ends_the_process_before_it_has_configs_is_left_out(path: Path) -> None:
    check = f"    @classmethod\n    def check(cls, d_model, config):\n        {EXIT}\n"
    other = f"class Other(Good):\n{check}\n\n"
    report = checked(
        path,
        ("@hookimpl\n", f"{other}@hookimpl\n"),
        (REGISTER, REGISTER + '    register("other", Other)\n'),
        only=("class_attributes", "configs"),
    )
    assert [(check.thing, check.check, check.outcome) for check in report.checks] == [
        ("layer other", "configs", "failed"),
        ("layer good", "class_attributes", "passed"),
    ]
    failed = failure(report)
    assert failed.message == "the process ended with status 3 while its configs were derived"
    assert failed.line == line_of(path, EXIT)


def test_a_plugin_that_ends_the_process_at_import_is_a_failure(path: Path) -> None:
    report = checked(path, at_import(EXIT))
    assert report.subject.plugins == ("bad",)
    (failed,) = report.checks
    assert (failed.thing, failed.check) == ("plugin bad", "loads")
    assert failed.message == "the process ended with status 3 while it was loaded"
    assert (failed.file, failed.line) == (str(path), line_of(path, EXIT))


@pytest.mark.slow
def test_a_plugin_that_hangs_at_import_is_a_failure(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "LOADING", 10.0)
    report = checked(path, at_import("while True: __import__('time').sleep(1)"))
    failed = failure(report)
    assert failed.message == "did not end within 10 s while it was loaded"
    assert failed.line == line_of(path, "while True")


@pytest.mark.slow
def test_another_plugin_that_ends_the_process_is_named(path: Path) -> None:
    other = path.with_name("other.py")
    other.write_text(edited("metric", ("@hookimpl\n", f"{SEGFAULT}\n\n\n@hookimpl\n")))
    with pytest.raises(WorkbenchError, match="SIGSEGV") as caught:
        checked(path)
    assert f"(at {other}:{line_of(other, SEGFAULT)}), and it is none of 'bad'" in str(caught.value)


@pytest.mark.slow
def test_the_other_plugins_of_a_package_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "two_first.py").write_text(edited("layer", at_import(EXIT)))
    (tmp_path / "two_second.py").write_text(edited("metric"))
    info = tmp_path / "two-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: two\nVersion: 1.0\n")
    points = "[workbench.v1]\nfirst = two_first\nsecond = two_second\n"
    (info / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    report = check_package("two", only="class_attributes", timeout=60.0)
    assert sorted(report.subject.plugins) == ["first", "second"]
    assert [(check.thing, check.check, check.outcome) for check in report.checks] == [
        ("plugin first", "loads", "failed"),
        ("metric good", "class_attributes", "passed"),
    ]


@pytest.mark.parametrize("with_what", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_when_the_command_is_stopped(path: Path, with_what: signal.Signals) -> None:
    """By Ctrl-C it ends in order; killed itself, it takes the others with it."""
    body = (
        "import os, pathlib, subprocess, time\n"
        "        child = subprocess.Popen(['sleep', '600'])\n"
        "        pathlib.Path(__file__ + '.pids').write_text(f'{os.getpid()} {child.pid}\\n')\n"
        "        time.sleep(600)"
    )
    path.write_text(edited("layer", in_step(body)))
    pids = path.with_name("bad.py.pids")
    command = [COMMAND, "check-plugin", str(path), "--only", "steps_continue"]
    folder = path.with_name("temporary")
    folder.mkdir()
    environment = {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        deadline = time.monotonic() + 120
        while not (pids.exists() and pids.read_text().endswith("\n")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(with_what)
        _, error = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGKILL: -9}[with_what]
    assert b"Traceback" not in error
    assert (b"interrupted. No results are kept" in error) == (with_what == signal.SIGINT)
    assert all(gone(int(pid)) for pid in pids.read_text().split())
    assert not list(folder.glob("workbench-check-*"))
