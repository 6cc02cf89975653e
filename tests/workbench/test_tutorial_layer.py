"""docs/tutorial-layer.md is true: its files, written as it says, load, pass and build.

Its commands are run as they stand there, those that check a plugin in this process.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.workbench.plugin_files import DOCS, builder_of, code_blocks
from workbench.cli.app import run_app
from workbench.testing import LayerContract

DOCUMENT = (DOCS / "tutorial-layer.md").read_text(encoding="utf-8")
LAYER, TEST, USE = code_blocks(DOCUMENT)
COMMANDS = [
    shlex.split(line.removeprefix("$ "))
    for block in code_blocks(DOCUMENT, "console")
    for line in block.splitlines()
]
(REPORT,) = code_blocks(DOCUMENT, "text")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`my_layers` as the page has it."""
    folder = tmp_path / "my_layers"
    folder.mkdir()
    (folder / "token_shift.py").write_text(LAYER, encoding="utf-8")
    (folder / "test_token_shift.py").write_text(TEST, encoding="utf-8")
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in that folder, one thread."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_its_test_passes_where_the_page_says(folder: Path) -> None:
    result = run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert result.returncode == 0, result.stdout
    passed = int(result.stdout.rsplit("\n", 2)[-2].split()[0])
    suite = {name for name in dir(LayerContract) if name.startswith("test_")}
    assert passed > len(suite), "every test of the suite, most of them twice"


@pytest.mark.slow
def test_its_failures_read_as_the_page_says(folder: Path) -> None:
    leaky = LAYER.replace("context.seq_idx_BT is not None", "False")
    leaky = leaky.replace("state.last_BD = x_BTD[:, -1]", "pass")
    (folder / "token_shift.py").write_text(leaky, encoding="utf-8")
    result = run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow")
    assert result.returncode == 1
    for message in ("document at 1 of row 0: outputs", "steps against forward, length 7"):
        assert f"`{message}: off by …`" in DOCUMENT
        assert f"AssertionError: {message}: off by " in result.stdout


@pytest.fixture
def check(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Status and output of the page's command that checks the layer alone, with more options."""
    (folder / "test_token_shift.py").unlink()
    monkeypatch.chdir(folder.parent)
    # pytest-xdist gives lines a width, to which prose would be wrapped.
    monkeypatch.setenv("COLUMNS", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*more: str) -> tuple[int, str]:
        command = ["workbench", "check-plugin", "my_layers/token_shift.py"]
        assert command in COMMANDS
        status = run_app([*command[1:], *more])
        return status, capsys.readouterr().out

    return run


@pytest.mark.slow
def test_check_plugin_passes_as_the_page_says(check: Callable[..., tuple[int, str]]) -> None:
    status, out = check()
    assert status == 0, out
    assert out.splitlines()[-1].startswith("token_shift: ")


def test_check_plugin_reports_as_the_page_says(
    folder: Path, check: Callable[..., tuple[int, str]]
) -> None:
    leaky = LAYER.replace("context.mask_padding(x_BTD)", "x_BTD")
    (folder / "token_shift.py").write_text(leaky, encoding="utf-8")
    status, out = check("--only", "padding")
    assert status == 1
    assert REPORT in out
    (line,) = [i for i, text in enumerate(leaky.splitlines(), 1) if "def forward(" in text]
    assert f"look at:   {folder / 'token_shift.py'}:{line}\n" in out
    assert "mend:      Use `context.attention_mask_BT`" in out


def test_a_package_is_begun_as_the_page_says(tmp_path: Path) -> None:
    command = ["workbench", "new-plugin", "token-mixer", "--kind", "layer"]
    after = COMMANDS.index(command)
    result = run(tmp_path, str(Path(sys.executable).with_name("workbench")), *command[1:])
    assert result.returncode == 0, result.stderr
    shown = [shlex.split(line) for line in result.stdout.splitlines() if "token-mixer" in line]
    assert shown[1:4] == COMMANDS[after + 1 :]
    assert (tmp_path / "token-mixer" / "pyproject.toml").is_file()


def test_it_is_used_as_the_page_says(folder: Path) -> None:
    result = run(folder.parent, "-c", USE)
    assert result.returncode == 0, result.stderr
    pattern, parameters = result.stdout.split()
    assert pattern == "ssss"
    assert int(parameters) == 256 * 64 + 4 * (64 * 64 + 64 + 64) + 64


def test_its_test_file_is_no_plugin(folder: Path) -> None:
    builder = builder_of(folder)
    assert list(builder.plugins.loaded) == ["token_shift"]
    assert builder.plugins.failures == {}
    assert list(builder.layers) == ["token-shift"]
