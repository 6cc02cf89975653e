"""What is installed from wheels: the workbench with both its roots, and the packages beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("distributions")]


def project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workbench and every package under plugins/, built from what git would commit."""
    folder = tmp_path_factory.mktemp("wheels")
    sources = tmp_path_factory.mktemp("sources")
    copies = [sources / package.name for package in [ROOT, *PACKAGES]]
    for package, copy in zip([ROOT, *PACKAGES], copies, strict=True):
        # A build leaves files beside the sources, and reads what earlier builds left.
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=package, capture_output=True, check=True, text=True)
        for name in filter(None, names.stdout.split("\0")):
            if (package / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                (copy / name).write_bytes((package / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command = [*pip, "--disable-pip-version-check", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), *map(str, copies)], check=True)
    return folder


@pytest.fixture(scope="module")
def environment(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheels, which sees this one's other packages."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        check=True,
        text=True,
    ).stdout.strip()
    # Python does not follow the .pth files in there, so the checkout is not on its path.
    Path(site, "theirs.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-index", *wheels.glob("*.whl")], check=True)
    return folder


def run(environment: Path, folder: Path, *command: str) -> str:
    """Standard output of a command of that environment."""
    result = subprocess.run(
        [environment / "bin" / command[0], *command[1:]],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_wheel_holds_both_roots(wheels: Path) -> None:
    (wheel,) = wheels.glob("lm_workbench-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.endswith(".py")}
    roots = [ROOT / "workbench", *ROOT.glob("plugins/workbench_*")]
    expected = {str(path.relative_to(root.parent)) for root in roots for path in root.rglob("*.py")}
    assert held == expected
    assert len(roots) > 8


def test_every_package_is_found(environment: Path, tmp_path: Path) -> None:
    found = json.loads(run(environment, tmp_path, "workbench", "plugins", "--json"))
    rows = {(row["package"], row["version"]) for row in found["registered"]}
    declared = {(project(path)["name"], project(path)["version"]) for path in [ROOT, *PACKAGES]}
    assert rows == declared
    assert all(str(environment) in row["file"] for row in found["registered"])


def test_their_layers_train_and_decode_together(environment: Path, tmp_path: Path) -> None:
    """One model of every layer that is installed, built-in or not, default after default."""
    program = """
import json, torch
from workbench.builder import default_builder
from workbench.layout import Block, Layout
builder = default_builder()
names = ["attention", *(name for name in builder.layers if name != "attention")]
layout = Layout(d_model=128, vocab_size=64, blocks=tuple(Block(layer=name) for name in names))
model = builder.build(layout).double()
tokens_BT = torch.randint(64, (2, 9))
loss = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
loss.backward()
with torch.no_grad():
    states = model.init_state(2, 9)
    steps = [model.step(tokens_B, states) for tokens_B in tokens_BT.T]
    difference = (torch.stack(steps, 1) - model(tokens_BT)).abs().max().item()
packages = sorted({builder.layers.provenance(name).package for name in names})
lacking = [name for name, value in model.named_parameters() if value.grad is None]
counted = builder.costs(layout, length=8).total.parameters
print(json.dumps([len(names), packages, difference, lacking, counted, model.num_parameters]))
"""
    count, packages, difference, lacking, counted, held = json.loads(
        run(environment, tmp_path, "python", "-c", program)
    )
    assert count > 12
    assert len(packages) > 7
    assert difference < 1e-9
    assert lacking == []
    assert counted == held


@pytest.mark.parametrize("package", ["lm-kv-sharing", "example-linear-attention"])
def test_a_package_is_checked_where_it_is_installed(
    environment: Path, tmp_path: Path, package: str
) -> None:
    output = run(environment, tmp_path, "workbench", "check-plugin", package)
    assert package in output
