"""docs/layers.md is true: its layers, in a file of their own, pass the page's tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.workbench.plugin_files import DOCS, builder_of, code_blocks
from workbench.layout import Block, Layout
from workbench.testing import LayerContract

SHARED, SHARED_TEST, READING, READING_TEST = code_blocks(
    (DOCS / "layers.md").read_text(encoding="utf-8")
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The page's layers and their tests, each in a file."""
    (tmp_path / "my_layers.py").write_text(f"{SHARED}\n\n{READING}", encoding="utf-8")
    tests = f"{SHARED_TEST}\n\n{READING_TEST}"
    (tmp_path / "test_my_layers.py").write_text(tests, encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_its_tests_pass(folder: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    passed = int(result.stdout.rsplit("\n", 2)[-2].split()[0])
    suite = {name for name in dir(LayerContract) if name.startswith("test_")}
    assert passed > 2 * len(suite)


def test_what_it_says_of_a_model(folder: Path) -> None:
    builder = builder_of(folder)
    names = ("shared-mlp", "publisher", "shared-mlp", "reader")
    layout = Layout(d_model=32, vocab_size=64, blocks=tuple(Block(layer=name) for name in names))
    model = builder.build(layout)
    assert model.sources == [None, None, 0, 1]
    assert model.layers[2].up_proj is model.layers[0].up_proj
    assert builder.costs(layout, length=8).total.parameters == model.num_parameters
    assert torch.isfinite(model(torch.arange(6)[None])).all()
