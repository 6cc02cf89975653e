"""Descriptions that are shipped: as they would be computed, or not at all."""

from __future__ import annotations

import json
import random
import shutil
import zipfile
from collections.abc import Callable
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import pytest

import workbench
from workbench import description_shipped
from workbench.api import describe
from workbench.builder import default_builder
from workbench.description_cache import DescriptionCache
from workbench.description_entry import write_entry
from workbench.description_making import DISTRIBUTION, make
from workbench.description_shipped import folder_of, made_from, member, plugin_points, shipped
from workbench.neighbours import CORE

pytestmark = pytest.mark.xdist_group("descriptions")

BUILT_IN = [p for p in distribution(DISTRIBUTION).entry_points if p.group.startswith(CORE)]
PACKAGES = [CORE, *(point.module for point in BUILT_IN)]
FORMULAS, QUANTIZED = "bamba-9b", "bitbytelm-mamba"


def request(name: str, **conditions: int) -> dict[str, Any]:
    """As the command line asks."""
    nothing = dict.fromkeys(("context", "batch_size", "bytes_per_element"))
    return {"source": name, **nothing, **conditions}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shipped") / "descriptions.zip"
    make(path)
    return path


@pytest.fixture(autouse=True)
def only_built_in(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The archive in its place, in an environment without other plugins."""
    monkeypatch.setattr(description_shipped, "ARCHIVE", archive)
    monkeypatch.setattr(description_shipped, "plugin_points", lambda: BUILT_IN)
    for name in ("DISABLE", "RUNS", "CACHE", "BACKENDS", "STORAGE"):
        monkeypatch.delenv(f"WORKBENCH_{name}", raising=False)


def test_every_preset_is_shipped_as_it_is_computed() -> None:
    builder = default_builder()
    own = [n for n in builder.presets if builder.presets.provenance(n).package == DISTRIBUTION]
    assert len(own) > 25
    for name in own:
        found = shipped(request(name))
        computed = describe(name)
        assert found is not None
        assert json.dumps(found.to_dict()) == json.dumps(computed.to_dict())
        assert str(found) == str(computed)


@pytest.mark.parametrize(
    "asked",
    [
        request(FORMULAS, context=2048),
        request(FORMULAS, batch_size=2),
        request(FORMULAS, bytes_per_element=4),
        request("no-such-preset"),
        request("quickstart:3"),
        request(f"../{FORMULAS}"),
    ],
    ids=str,
)
def test_any_other_request_is_computed(asked: dict[str, Any]) -> None:
    assert shipped(asked) is None


def test_plugin_folders_and_settings_are_computed_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shipped(request(FORMULAS), (str(tmp_path),)) is None
    monkeypatch.setenv("WORKBENCH_RUNS", str(tmp_path))
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    monkeypatch.setenv("WORKBENCH_DISABLE", "")
    assert shipped(request(FORMULAS)) is not None
    monkeypatch.setenv("WORKBENCH_DISABLE", "export")
    assert shipped(request(FORMULAS)) is None


def test_a_process_that_has_torch_computes() -> None:
    assert shipped(request(FORMULAS)) is not None
    assert DescriptionCache(request(FORMULAS)).find() is None


@pytest.mark.parametrize("group", ["workbench.v1", "workbench", "workbench.v99"])
def test_nothing_is_used_beside_another_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str
) -> None:
    monkeypatch.setattr(description_shipped, "plugin_points", plugin_points)
    info = tmp_path / "lm_idle-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lm-idle\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\nidle = lm_idle\n")
    before = made_from(plugin_points(), ())
    monkeypatch.syspath_prepend(tmp_path)
    after = made_from(plugin_points(), ())
    assert {*after["plugins"]} - {*before["plugins"]} == {f"{group}: idle = lm_idle"}
    assert shipped(request(FORMULAS)) is None


def longer(path: Path) -> None:
    path.write_text(path.read_text() + "\n")


CHANGES: dict[str, Callable[[Path], object]] = {
    "longer": lambda folder: longer(folder / "__init__.py"),
    "other": lambda folder: (folder / "__init__.py").write_text("x"),
    "more": lambda folder: (folder / "more.py").write_text(""),
    "less": lambda folder: (folder / "__init__.py").unlink(),
    "renamed": lambda folder: (folder / "__init__.py").rename(folder / "init.py"),
    "data": lambda folder: (folder / "data.json").write_text("{}"),
    "gone": shutil.rmtree,
}


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the packages, which are found there."""
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "*.zip")
        shutil.copytree(folder_of(package), tmp_path / package, ignore=ignored)
    monkeypatch.setattr(description_shipped, "folder_of", lambda name: str(tmp_path / name))
    return tmp_path


def test_where_the_sources_lie_does_not_matter_but_each_counts(
    copies: Path, tmp_path: Path
) -> None:
    assert shipped(request(FORMULAS)) is not None
    for package in PACKAGES:
        folder = copies / package
        kept = shutil.copytree(folder, tmp_path / "kept")
        for name, change in CHANGES.items():
            change(folder)
            assert shipped(request(FORMULAS)) is None, f"{package}: {name}"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(kept, folder)
        shutil.rmtree(kept)
        assert shipped(request(FORMULAS)) is not None


def test_what_is_no_source_does_not_count(copies: Path) -> None:
    (copies / CORE / "__pycache__").mkdir()
    (copies / CORE / "__pycache__/costs.pyc").write_bytes(b"code")
    (copies / CORE / ".costs.py.swp").write_text("an editor's")
    (copies / CORE / "descriptions.zip").write_text("these")
    assert shipped(request(FORMULAS)) is not None


def test_only_what_was_computed_with_torch_asks_for_its_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = version("torch").partition("+")[0]
    info = tmp_path / "torch-0.dist-info"
    info.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert shipped(request(QUANTIZED)) is None  # of no version at all
    for now, has_quantized in ((f"{release}+label", True), ("99.1", False), (release, True)):
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {now}\n")
        assert version("torch") == now
        assert (shipped(request(QUANTIZED)) is not None) == has_quantized
        assert shipped(request(FORMULAS)) is not None


def test_a_damaged_archive_is_as_good_as_none(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut anywhere, or with a byte that is another: what is found is right, or nothing."""
    path = tmp_path / "descriptions.zip"
    with zipfile.ZipFile(archive) as whole, zipfile.ZipFile(path, "w") as one:
        one.writestr(member(FORMULAS), whole.read(member(FORMULAS)), zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(description_shipped, "ARCHIVE", path)
    now = made_from(BUILT_IN, ())
    monkeypatch.setattr(description_shipped, "made_from", lambda *_: now)
    right = shipped(request(FORMULAS))
    assert right is not None
    content = path.read_bytes()
    chance = random.Random(0)
    found = []
    for _ in range(1000):
        place = chance.randrange(len(content))
        changed = bytes([content[place] ^ chance.randrange(1, 256)])
        path.write_bytes(content[:place] + changed + content[place + 1 :])
        found.append(shipped(request(FORMULAS)))
        path.write_bytes(content[:place])
        assert shipped(request(FORMULAS)) is None
    assert found.count(None) > 900
    assert {str(one) for one in found if one is not None} <= {str(right)}


def test_a_foreign_archive_is_as_good_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "descriptions.zip"
    monkeypatch.setattr(description_shipped, "ARCHIVE", path)
    assert shipped(request(FORMULAS)) is None
    path.mkdir()
    assert shipped(request(FORMULAS)) is None
    path.rmdir()
    path.write_text("no archive")
    assert shipped(request(FORMULAS)) is None
    description = describe(FORMULAS)
    own = write_entry(description, made_from(BUILT_IN, ()))
    strange = [
        "",
        "no entry",
        own.partition("\n")[2],
        own.replace("4096", "4097"),
        write_entry(description, {}),
        write_entry(description, {"surroundings": "", "sources": {}}),
        write_entry(description, made_from(BUILT_IN, ["torch"]) | {"releases": {"torch": "1"}}),
    ]
    for text in (*strange, own):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(member(FORMULAS), text)
        assert (shipped(request(FORMULAS)) is not None) == (text is own)


def test_the_archive_lies_beside_the_module() -> None:
    """Package data are found there, in a checkout and where a wheel is installed."""
    from workbench import description_making

    (default,) = description_making.make.__defaults__ or ()
    assert default == Path(workbench.__file__).with_name("descriptions.zip")
