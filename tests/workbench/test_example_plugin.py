"""plugins/example-linear-attention is a stranger: once it is installed, its layer is there.

It is installed into an empty folder, as pip installs it anywhere, and seen from a fresh process.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "plugins" / "example-linear-attention"

INSPECT = """
import json, torch
from workbench import Block, Builder, Layout

torch.set_num_threads(1)
builder = Builder.load()
layout = Layout(d_model=32, vocab_size=64, blocks=(
    Block(layer="linear-attention", config={"num_heads": 2}),
    Block(layer="linear-attention"),
))
model = builder.build(layout).eval()
tokens_BT = torch.arange(24).reshape(2, 12)
with torch.no_grad():
    states = model.init_state(2, 12)
    prefilled_BV = model.prefill(tokens_BT[:, :11], states)
    stepped_BV = model.step(tokens_BT[:, 11], states)
    logits_BTV = model(tokens_BT)
print(json.dumps({
    "provenance": builder.layers.provenance("linear-attention").to_dict(),
    "failures": list(builder.plugins.failures),
    "plugins": list(builder.plugins.loaded),
    "pattern": builder.pattern(layout),
    "resolved": builder.resolve(layout).to_dict()["blocks"],
    "counted": builder.costs(layout, length=12).total.parameters,
    "built": model.num_parameters,
    "difference": max(
        float((prefilled_BV - logits_BTV[:, 10]).abs().max()),
        float((stepped_BV - logits_BTV[:, 11]).abs().max()),
    ),
}))
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the installed example in it."""
    folder = tmp_path_factory.mktemp("example")
    # pip builds in the source folder: a copy keeps build/ and *.egg-info out of the checkout.
    copy = shutil.copytree(
        SOURCE,
        folder / "source",
        ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"),
    )
    result = run(
        *("-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"),
        *("--disable-pip-version-check", "--target", str(folder / "target"), str(copy)),
    )
    assert result.returncode == 0, result.stderr
    return folder / "target"


@pytest.fixture(scope="module")
def seen(target: Path) -> dict[str, Any]:
    """What a fresh process with that folder on its path sees."""
    result = run("-c", INSPECT, PYTHONPATH=str(target))
    assert result.returncode == 0, result.stderr
    seen: dict[str, Any] = json.loads(result.stdout)
    return seen


def test_its_layer_says_where_it_came_from(seen: dict[str, Any], target: Path) -> None:
    assert seen["provenance"] == {
        "plugin": "linear-attention",
        "package": "example-linear-attention",
        "version": "0.1.0",
        "module": "lm_linear_attention",
        "file": str(target / "lm_linear_attention.py"),
        "sha256": hashlib.sha256((target / "lm_linear_attention.py").read_bytes()).hexdigest(),
    }


def test_it_stands_beside_the_built_in_plugins(seen: dict[str, Any]) -> None:
    assert {"linear-attention", "mamba", "attention", "mlp"} <= set(seen["plugins"])
    assert seen["failures"] == []


def test_its_layer_is_built_through_a_layout(seen: dict[str, Any]) -> None:
    assert seen["pattern"] == "LL"
    assert seen["resolved"] == [
        {"layer": "linear-attention", "config": {"num_heads": 2}},
        {"layer": "linear-attention", "config": {"num_heads": 4}},
    ]
    assert seen["built"] == seen["counted"] == 64 * 32 + 2 * (4 * 32 * 32 + 32) + 32
    assert seen["difference"] < 1e-5


def test_it_can_be_disabled(target: Path) -> None:
    result = run("-c", INSPECT, PYTHONPATH=str(target), WORKBENCH_DISABLE="linear-attention")
    assert result.returncode != 0
    assert "unknown layer 'linear-attention'" in result.stderr


def test_nothing_but_its_code_is_installed(target: Path) -> None:
    assert {path.name for path in target.rglob("*.py")} == {"lm_linear_attention.py"}


def test_the_core_does_not_know_it() -> None:
    for path in (ROOT / "workbench").rglob("*.py"):
        text = path.read_text(encoding="utf-8").lower().replace("-", "_")
        assert "linear_attention" not in text, path
        assert "linearattention" not in text, path
