"""A wheel as `make wheel` leaves it: every preset is described at once, and as it is computed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import test_distributions
from tests.test_distributions import ROOT, run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("described wheel")]

COMMAND = """
import sys
from pathlib import Path
from workbench import description_shipped
from workbench.cli.app import run_app
if sys.argv[1] == "computed":
    description_shipped.ARCHIVE = Path("nothing is shipped")
status = run_app(["describe", *sys.argv[2:]])
print("torch" in sys.modules)
raise SystemExit(status)
"""
ALL = """
import json, sys
from workbench.description_shipped import shipped
names = json.loads(sys.argv[1])
found = [shipped({"source": name}) for name in names]
assert None not in found and "torch" not in sys.modules
from workbench.api import describe
assert [one.to_dict() for one in found] == [describe(name).to_dict() for name in names]
assert list(map(str, found)) == [str(describe(name)) for name in names]
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the wheel, made by the documented command from what git would commit."""
    copy = tmp_path_factory.mktemp("tree")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True)
    for name in filter(None, names.stdout.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    # With this environment, which is not to be installed anew.
    command = ["make", "wheel", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/dev"]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    return copy / "dist"


# It installs what `wheels` gives: here, another wheel than there.
environment = test_distributions.environment


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptions are kept in a folder of the test."""
    for name in ("COLUMNS", "WORKBENCH_DISABLE", "WORKBENCH_BACKENDS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))


def describe(environment: Path, folder: Path, way: str, *arguments: str) -> tuple[str, bool]:
    """What is printed where nothing was described before, and whether torch was imported."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    *lines, torch = run(environment, folder, "python", "-c", COMMAND, way, *arguments).splitlines()
    return "\n".join(lines), torch == "True"


@pytest.mark.parametrize(
    "arguments", [("bamba-9b",), ("mamba-130m", "--json"), ("bitbytelm-mamba",)], ids=" ".join
)
def test_the_first_description_needs_no_torch(
    environment: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    shown, has_torch = describe(environment, tmp_path, "shipped", *arguments)
    assert not has_torch
    assert describe(environment, tmp_path, "computed", *arguments) == (shown, True)
    assert arguments[0] in shown


def test_so_does_every_preset(environment: Path, tmp_path: Path) -> None:
    listed = run(environment, tmp_path, "workbench", "plugins", "--json")
    names = [row["name"] for row in json.loads(listed)["registered"] if row["kind"] == "presets"]
    assert len(names) > 25
    run(environment, tmp_path, "python", "-c", ALL, json.dumps(names))


def test_a_changed_source_is_described_as_it_is(environment: Path, tmp_path: Path) -> None:
    (source,) = environment.glob("lib/python*/site-packages/workbench_presets/hybrids.py")
    text = source.read_text()
    before, _ = describe(environment, tmp_path, "shipped", "bamba-9b")
    try:
        source.write_text(f"{text}\n# changed\n")
        assert describe(environment, tmp_path, "shipped", "bamba-9b") == (before, True)
    finally:
        source.write_text(text)
    assert describe(environment, tmp_path, "shipped", "bamba-9b") == (before, False)
