"""Stamps of sources: they change with whatever may change a description, and with nothing else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import workbench
from workbench.description_sources import digest, last_change, loaded_sources, surroundings


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    (folder / "inner").mkdir(parents=True)
    for name, text in {"__init__.py": "A = 1", "inner/data.json": "[1]", "table.csv": "1"}.items():
        (folder / name).write_text(text)
    return folder


CHANGES: dict[str, Callable[[Path], object]] = {
    "a source": lambda folder: (folder / "__init__.py").write_text("A = 2"),
    "data within": lambda folder: (folder / "inner/data.json").write_text("[2]"),
    "data of another kind": lambda folder: (folder / "table.csv").write_text("22"),
    "a new file": lambda folder: (folder / "inner/faster.py").write_text(""),
    "a file less": lambda folder: (folder / "inner/data.json").unlink(),
    "another name": lambda folder: (folder / "table.csv").rename(folder / "inner/table.csv"),
    "the folder gone": lambda folder: folder.rename(folder.with_name("gone")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_in_a_package_changes_its_digest(
    package: Path, change: Callable[[Path], object]
) -> None:
    before = digest(str(package))
    assert digest(str(package)) == before
    change(package)
    assert digest(str(package)) != before


def test_a_source_that_is_written_again_as_it_was_has_not_changed(package: Path) -> None:
    before = digest(str(package))
    text = (package / "__init__.py").read_text()
    (package / "__init__.py").unlink()
    (package / "__init__.py").write_text(text)
    os.utime(package / "__init__.py", (1, 1))
    (package / "__pycache__").mkdir()
    (package / "__pycache__/package.pyc").write_bytes(b"code")
    (package / ".notes.swp").write_text("an editor's")
    assert digest(str(package)) == before


def test_a_folder_of_modules_counts_without_the_folders_in_it(package: Path) -> None:
    flat = digest(f"{package}/")
    (package / "inner/data.json").write_text("[3]")
    assert digest(f"{package}/") == flat
    (package / "table.csv").write_text("333")
    assert digest(f"{package}/") != flat


def test_linked_folders_count_once(package: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (package / "linked").symlink_to(tmp_path / "elsewhere")
    (package / "inner/round").symlink_to(package)
    before = digest(str(package))
    (tmp_path / "elsewhere/module.py").write_text("")
    assert digest(str(package)) != before


def test_last_change_is_that_of_the_latest_file(package: Path) -> None:
    started = time.time_ns()
    while last_change([str(package)]) < started:  # the file system's clock has ticks
        (package / "inner/late.py").write_text("")
    os.utime(package / "inner/late.py", (1, 1))  # as `cp -p` leaves a file that it exchanges
    assert last_change([str(package)]) >= started
    assert last_change([]) == 0


def test_surroundings_are_what_is_installed_and_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = [surroundings()]
    assert surroundings() == seen[0]

    def has_changed() -> bool:
        seen.append(surroundings())
        return seen[-1] not in seen[:-1]

    monkeypatch.syspath_prepend(tmp_path)
    assert has_changed()
    info = tmp_path / "lm_new-1.0.dist-info"
    info.mkdir()
    assert has_changed()
    (info / "entry_points.txt").write_text("[workbench.v1]\nnew = lm_new\n")
    assert has_changed()
    (info / "entry_points.txt").write_text("[workbench.v1]\nnewer = lm_new\n")
    assert has_changed()
    monkeypatch.setenv("WORKBENCH_DISABLE", "mamba")
    assert has_changed()
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    assert not has_changed()


def test_loaded_sources_are_the_cores_and_the_plugins(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "site-packages/lm_plugin").mkdir(parents=True)
    (tmp_path / "site-packages/lm_plugin/__init__.py").write_text("import package")
    (tmp_path / "site-packages/other.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    for name in ("lm_plugin", "package", "other"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        __import__(name)
    found = loaded_sources(["lm_plugin.layers"], [str(tmp_path / "folder")])
    expected = {
        str(Path(workbench.__file__).parent),
        str(tmp_path / "site-packages/lm_plugin"),
        str(package),
        f"{tmp_path / 'folder'}/",
    }
    assert expected <= found.keys()
    assert not [place for place in found if place.startswith(os.path.dirname(os.__file__))]
    assert f"{tmp_path / 'site-packages'}/" not in found
    assert found[str(package)] == digest(str(package))
