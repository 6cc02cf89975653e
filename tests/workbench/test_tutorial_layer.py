"""docs/tutorial-layer.md is true: its files, written as it says, load, pass and build."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workbench.plugin_files import DOCS, builder_of, code_blocks
from workbench.testing import LayerContract

DOCUMENT = (DOCS / "tutorial-layer.md").read_text(encoding="utf-8")
LAYER, TEST, USE = code_blocks(DOCUMENT)


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


def test_its_test_passes_where_the_page_says(folder: Path) -> None:
    result = run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert result.returncode == 0, result.stdout
    passed = int(result.stdout.rsplit("\n", 2)[-2].split()[0])
    suite = {name for name in dir(LayerContract) if name.startswith("test_")}
    assert passed > len(suite), "every test of the suite, most of them twice"


def test_its_failures_read_as_the_page_says(folder: Path) -> None:
    leaky = LAYER.replace("context.seq_idx_BT is not None", "False")
    leaky = leaky.replace("state.last_BD = x_BTD[:, -1]", "pass")
    (folder / "token_shift.py").write_text(leaky, encoding="utf-8")
    result = run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert result.returncode == 1
    for message in ("document at 1 of row 0: outputs", "steps against forward, length 7"):
        assert f"`{message}: off by …`" in DOCUMENT
        assert f"AssertionError: {message}: off by " in result.stdout


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
