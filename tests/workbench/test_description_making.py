"""Making the descriptions that are shipped: exact, repeatable, and of whole sources only."""

from __future__ import annotations

import datetime
import gc
import json
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from workbench.builder import Builder
from workbench.description_making import make, watched
from workbench.errors import WorkbenchError

pytestmark = pytest.mark.xdist_group("descriptions")


def install(folder: Path, name: str, module: str, source: str) -> None:
    """A distribution with one plugin, as pip leaves them."""
    info = folder / f"{name.replace('-', '_')}-9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.0\n")
    (info / "entry_points.txt").write_text(f"[workbench.v1]\n{module} = {module}\n")
    (folder / module).mkdir()
    (folder / module / "__init__.py").write_text(source)


def test_the_same_sources_give_the_same_bytes_whatever_else_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first.zip", tmp_path / "second.zip"
    names = make(first)
    install(tmp_path, "lm-stranger", "lm_stranger", "raise RuntimeError('loaded')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("WORKBENCH_DISABLE", "mamba")
    assert make(second) == names
    assert second.read_bytes() == first.read_bytes()
    assert os.environ["WORKBENCH_DISABLE"] == "mamba"
    with zipfile.ZipFile(first) as archive:
        texts = [archive.read(name).decode() for name in archive.namelist()]
    entries = [json.loads(text.partition("\n")[2]) for text in texts]
    assert [entry["description"]["name"] for entry in entries] == names
    quantized = {
        entry["description"]["name"]
        for entry in entries
        if any(row["quantizer"] for row in entry["description"]["blocks"])
    }
    assert 0 < len(quantized) < len(names)
    for entry in entries:
        needed = {"torch"} if entry["description"]["name"] in quantized else set()
        assert entry["made_from"]["releases"].keys() == needed


def test_costs_of_presets_are_whole_numbers() -> None:
    """Their sums are then the same with every version of Python."""
    builder = Builder.load()
    for name in builder.presets:
        costs = builder.costs(builder.presets[name].layout(), length=2048, bytes_per_element=2)
        for part in (costs.total, *(block.costs for block in costs.blocks)):
            assert {type(value) for value in vars(part).values()} == {int}
        assert {type(block.weight_bytes) for block in costs.blocks} == {int}


CALLS: dict[str, tuple[Callable[[], object], str]] = {
    "a function": (lambda: json.dumps({}), "json"),
    "a method": (lambda: torch.nn.Module(), "torch"),
    "a function in C": (lambda: torch.zeros(1), "torch"),
    "a method in C": (lambda: tensor.size(), "torch"),
    "a method of a class in C": (lambda: datetime.date.today(), "datetime"),
    "numpy": (lambda: np.array([1]), "numpy"),
    "through others": (lambda: sorted([2, 1], key=lambda i: torch.zeros(i).numel()), "torch"),
}
tensor = torch.zeros(1)


@pytest.mark.parametrize(("call", "package"), CALLS.values(), ids=CALLS.keys())
def test_packages_are_seen_whose_functions_are_called(
    call: Callable[[], object], package: str
) -> None:
    with watched() as before:
        pass
    with watched() as packages:
        call()
    assert package in packages - before
    assert sys.getprofile() is None


def test_what_a_collection_of_garbage_calls_is_not_seen() -> None:
    """Whatever this process did before may have left a finalizer, or listens to collections."""

    def listener(phase: str, info: dict[str, int]) -> None:
        json.dumps(phase)

    gc.callbacks.append(listener)
    thresholds = gc.get_threshold()
    try:
        with watched() as packages:
            gc.set_threshold(1)
            kept = [[number] for number in range(1000)]
        assert len(kept) == 1000
        assert "json" not in packages
        assert gc.isenabled()
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(listener)


BAD = {
    "does not load": ("raise RuntimeError('too early')", "do not load: lm_bad: .*too early"),
    "changes": (
        "from pathlib import Path\nPath(__file__).with_name('more.py').touch()",
        "changed while the presets were described",
    ),
}


@pytest.mark.parametrize(("source", "words"), BAD.values(), ids=BAD.keys())
def test_a_plugin_of_its_own_is_refused_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: str
) -> None:
    install(tmp_path, "lm-workbench", "lm_bad", source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lm_bad", raising=False)
    with pytest.raises(WorkbenchError, match=words):
        make(tmp_path / "made.zip")
    assert not (tmp_path / "made.zip").exists()
    monkeypatch.delitem(sys.modules, "lm_bad", raising=False)


def test_a_plugin_that_is_no_package_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "lm-workbench", "lm_flat", "")
    (tmp_path / "lm_flat/__init__.py").rename(tmp_path / "lm_flat.py")
    (tmp_path / "lm_flat").rmdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(WorkbenchError, match=r"no package, or not to be read: .*lm_flat"):
        make(tmp_path / "made.zip")
