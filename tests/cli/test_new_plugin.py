"""`workbench new-plugin`: what it writes installs, passes its own test and the checks, at once."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Cli, process
from workbench.builder import default_builder
from workbench.scaffold import KINDS, write_plugin

pytestmark = pytest.mark.xdist_group("new-plugin")

# What is slow in the layer's checks is checked elsewhere.
QUICK = "not compiles and not export_round_trip"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package of every kind, as the command writes it."""
    folder = tmp_path_factory.mktemp("written")
    for kind in KINDS:
        write_plugin(f"fresh-{kind}", kind, folder, default_builder())
    return folder


@pytest.fixture(scope="module")
def site(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which all of them are installed, by one pip without a network."""
    folder = tmp_path_factory.mktemp("site")
    sources = shutil.copytree(written, folder / "sources")  # pip leaves build/ behind
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--quiet")
    command = (sys.executable, "-m", "pip", "install", *options, "--disable-pip-version-check")
    packages = [str(sources / f"fresh-{kind}") for kind in KINDS]
    subprocess.run(
        [*command, "--target", str(folder / "site"), *packages], check=True, capture_output=True
    )
    return folder / "site"


@pytest.mark.slow
def test_its_own_tests_pass_where_it_is_installed(written: Path, site: Path) -> None:
    options = ("-q", "-p", "no:cacheprovider", "-W", "error", "--import-mode=importlib")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-m", "not slow", str(written)],
        cwd=site.parent,
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_check_plugin_passes(
    cli: Cli, site: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"fresh-{kind}"
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site))
    result = cli("check-plugin", name, "--only", QUICK, "--json")
    assert result.status == 0, result
    report = result.json
    assert report["passed"] >= 4
    assert report["failed"] == report["skipped"] == 0
    things = {check["thing"] for check in report["checks"]}
    registry = KINDS[kind].registry.removesuffix("s").replace("_", " ")
    assert things == {f"{registry} {name}"}


@pytest.mark.slow
def test_everything_is_listed_with_its_package(site: Path) -> None:
    rows = json.loads(process("plugins", "--json", PYTHONPATH=str(site)).stdout)["registered"]
    for kind, about in KINDS.items():
        (row,) = [row for row in rows if row["package"] == f"fresh-{kind}"]
        assert (row["kind"], row["name"]) == (about.registry, f"fresh-{kind}")
        assert row["file"] == str(site / f"fresh_{kind}.py")


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_package_of_four_files(written: Path, kind: str) -> None:
    folder, module = written / f"fresh-{kind}", f"fresh_{kind}.py"
    names = {"pyproject.toml", "README.md", module, f"test_{module}"}
    assert {path.name for path in folder.iterdir()} == names
    assert 15 <= len((folder / "README.md").read_text().splitlines()) <= 40
    for path in folder.iterdir():
        assert "$" not in path.read_text(), path
    for name in (module, f"test_{module}"):
        tree = ast.parse((folder / name).read_text())
        assert ast.get_docstring(tree), name
        assert max(map(len, (folder / name).read_text().splitlines())) <= 100


def test_it_says_what_to_type_next(cli: Cli, tmp_path: Path) -> None:
    result = cli("new-plugin", "my-mixer", "--kind", "layer")
    assert result.status == 0
    files = "README.md, my_mixer.py, pyproject.toml, test_my_mixer.py"
    assert result.out.splitlines() == [
        f"Wrote my-mixer: {files}",
        "",
        "Next:",
        "  pip install -e my-mixer",
        "  python -m pytest my-mixer",
        "  workbench check-plugin my-mixer",
        '  mixers = ["my-mixer"]   # in a study',
    ]


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("My-Mixer", "layer", "'My-Mixer': use lower case letters and digits"),
        ("my_mixer", "layer", "'my_mixer': use lower case letters and digits"),
        ("-x", "layer", "No such option"),
        ("2fast", "layer", "'2fast': use lower case"),
        ("../up", "layer", "'../up': use lower case"),
        ("class", "layer", "'class' is a name of Python's own"),
        ("state", "layer", "its class State would hide another of that name"),
        ("costs", "layer", "its class Costs would hide another of that name"),
        ("json", "layer", "'json' is a name of Python's own"),
        ("mamba", "layer", "'mamba' is a plugin already"),
        ("mamba2", "layer", "'mamba2' is a layer of mamba already"),
        ("periodic", "placement", "'periodic' is a placement of placement already"),
        ("lm-workbench", "layer", "'lm-workbench' is an installed package already"),
        ("torch", "layer", "'torch' is an installed package already"),
        ("workbench-mamba", "layer", "a module (workbench_mamba) that can be imported"),
        ("my-mixer", "layers", "unknown kind 'layers'. Did you mean 'layer'?"),
    ],
)
def test_a_name_that_cannot_be_used_leaves_nothing(
    cli: Cli, tmp_path: Path, name: str, kind: str, words: str
) -> None:
    assert words in cli("new-plugin", name, "--kind", kind).refused()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_alone(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "is there already" in cli("new-plugin", "mine", "--kind", "metric").refused()
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]


def test_what_cannot_be_written_leaves_nothing(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, text: str, **options: object) -> int:
        if self.name.startswith("test_"):
            raise OSError(28, "No space left on device")
        return len(self.write_bytes(text.encode()) and text)

    monkeypatch.setattr(Path, "write_text", full)
    message = cli("new-plugin", "mine", "--kind", "metric").refused()
    assert "cannot write mine: No space left on device" in message
    assert list(tmp_path.iterdir()) == []
