"""Ctrl-C at any moment: no traceback, the status that shells expect, and nothing lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.conftest import COMMAND, TOYS, Cli
from workbench.records import load_study

# Interrupts its own process where it first looks for a module.
AT_IMPORT = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ.get("INTERRUPT_AT"):
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
"""
SLOW_LAYOUT = '{"d_model": 8, "vocab_size": 16, "blocks": [{"layer": "slow"}]}'
SLOW_TRAINING = (
    "--plugin-dir", str(TOYS), "--data", "counting", "--device", "cpu", "--tokens", "1024",
    "--seq-len", "16", "--batch-size", "4", "--checkpoint-seconds", "0.001",
)  # fmt: skip


@contextmanager
def started(
    folder: Path, *arguments: str | Path, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """A command in a process and a session of its own, ended at the latest with the block."""
    with subprocess.Popen(
        [COMMAND, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def interrupt(process: subprocess.Popen[str], number: int = signal.SIGINT) -> tuple[str, str]:
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    assert "Error" not in err
    return out, err


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    "module",
    [
        "workbench.cli.app", "typer", "workbench.cli.show", "workbench.study_config", "torch",
        "torch.nn.functional", "numpy", "workbench_mamba", "workbench_plugin_toys", "optuna",
        "rich.progress",
    ],
)  # fmt: skip
def test_while_python_imports(tmp_path: Path, toy_study: Path, module: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(AT_IMPORT)
    plugin = tmp_path / "interrupts.py"
    if module == "workbench_plugin_toys":  # a file of a plugin folder is not looked for
        plugin.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
        module = ""
    environment = {"PYTHONPATH": str(tmp_path), "INTERRUPT_AT": module}
    folders = ("--plugin-dir", tmp_path) if plugin.exists() else ()
    (tmp_path / "plugins").mkdir()
    with started(tmp_path, "run", toy_study, *folders, **environment) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.strip()) == (130, "", "interrupted.")
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def slow_study(toy_study: Path) -> Path:
    text = toy_study.read_text().replace('["toy", "other"]', '["slow"]').replace("[1, 2]", "1")
    text = text.replace("tokens = 512", "tokens = 1280\ncheckpoint_seconds = 0.001")
    toy_study.write_text(text.replace('"inline"', '"process"').replace("trials = 4", "trials = 1"))
    return toy_study


@pytest.mark.parametrize("moment", ["opened", "training"])
def test_a_run_resumes(cli: Cli, tmp_path: Path, slow_study: Path, moment: str) -> None:
    folder = tmp_path / "runs" / "toys"
    signs = {
        "opened": folder / "study.json",
        "training": folder / "trials" / "00000" / "checkpoint.safetensors",
    }
    with started(tmp_path, "run", slow_study) as process:
        wait_for(signs[moment].exists)
        if moment == "training":  # impatience makes no traceback either
            for _ in range(4):
                os.killpg(process.pid, signal.SIGINT)
                time.sleep(0.005)
            out, err = process.communicate(timeout=60)
        else:
            out, err = interrupt(process)
            assert err.endswith("the same command goes on from there.\n")
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    result = cli("run", slow_study, "--executor", "inline")
    assert result.status == 0
    assert "Study toys: resuming, " in result.err
    trials = load_study("toys").trials()
    assert [trial.outcome for trial in trials] in (["interrupted", "complete"], ["complete"])
    if moment == "training":
        assert trials[1].data["retry_of"] == 0
    assert not list(tmp_path.rglob("*.tmp"))


def test_training_goes_on_from_its_checkpoint(cli: Cli, tmp_path: Path) -> None:
    layout = tmp_path / "layout.json"
    layout.write_text(SLOW_LAYOUT)
    command = ("train", layout, tmp_path / "broken", *SLOW_TRAINING)
    with started(tmp_path, *command) as process:
        wait_for((tmp_path / "broken" / "checkpoint.safetensors").exists)
        _, err = interrupt(process)
    assert process.returncode == 130
    assert err.endswith("The same command goes on from the last checkpoint.\n")
    resumed = cli(*command)
    assert resumed.status == 0
    assert "Resuming from" in resumed.err
    assert cli("train", layout, tmp_path / "whole", *SLOW_TRAINING).status == 0
    for name in ("model.safetensors", "layout.json", "run.json"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "broken" / "checkpoint.safetensors").exists()


def test_generating(tmp_path: Path, notes: Path) -> None:
    options = ("--prompt", "Das", "--max-new-tokens", "100000", "--runs", notes)
    with started(tmp_path, "generate", "notes:0", *options) as process:
        assert process.stdout is not None
        assert process.stdout.read(3) == "Das"
        _, err = interrupt(process)
    assert (process.returncode, err.strip()) == (130, "interrupted.")


def test_exporting_leaves_nothing(tmp_path: Path, notes: Path) -> None:
    with started(tmp_path, "export", "notes:0", "out/model", "--runs", notes) as process:
        wait_for(lambda: list(tmp_path.glob("out/.model*/config.json")))
        _, err = interrupt(process)
    assert process.returncode == 130
    assert err.endswith("interrupted. Nothing was exported.\n")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_dashboard_ends_well(tmp_path: Path, notes: Path) -> None:
    options = ("--headless", "--port", "8731", "--runs", notes)
    with started(tmp_path, "dashboard", *options) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "URL" in line:
                break
        _, err = interrupt(process)
    assert process.returncode == 0
    assert "interrupted" not in err


def test_a_caller_that_ignores_it_is_obeyed(tmp_path: Path) -> None:
    """`nohup` and a shell's background jobs start commands with SIGINT ignored."""
    (tmp_path / "sitecustomize.py").write_text(AT_IMPORT)
    ignoring = (
        "import os, signal, sys; signal.signal(2, signal.SIG_IGN); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", ignoring, COMMAND, "show"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "INTERRUPT_AT": "typer"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
