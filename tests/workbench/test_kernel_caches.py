"""Compiled kernels lie beside the studies, unless the user's environment says otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from workbench import environment, kernel_caches
from workbench.errors import DiskError
from workbench.kernel_caches import (
    FOLDERS,
    SWITCHES,
    cache_name,
    kernels_folder,
    read_kernel_caches,
    use_kernel_caches,
)

COMPILES = """
import sys
from pathlib import Path
from workbench import environment
from workbench.kernel_caches import use_kernel_caches
environment.device_name = lambda device: "a planted device"
use_kernel_caches(Path(sys.argv[1]), "cuda")
import json, torch
import torch._functorch.config, torch._inductor.config
from torch._dynamo.utils import counters

def function(x_N):
    return (x_N.sin() * 3).relu().sum()

x_N = torch.ones(64, requires_grad=True)
torch.compile(function)(x_N).backward()
print(json.dumps({
    "counts": {**counters["aot_autograd"], **counters["inductor"]},
    "on": [torch._inductor.config.fx_graph_cache, torch._functorch.config.enable_autograd_cache],
}))
"""


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that says nothing, and a device that is not there."""
    for name in (*FOLDERS, *SWITCHES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(kernel_caches, "_set_here", {})
    monkeypatch.setattr(environment, "device_name", lambda device: "Planted (TM) GPU 9000")


def test_a_cpu_compiles_nothing_and_gets_no_folder(tmp_path: Path) -> None:
    before = dict(os.environ)
    assert use_kernel_caches(tmp_path, "cpu") is None
    assert dict(os.environ) == before
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    folder = use_kernel_caches(tmp_path, "cuda:0")
    assert folder == tmp_path / "kernels" / cache_name("cuda:0")
    for name, part in FOLDERS.items():
        assert Path(os.environ[name]) == folder / part
        assert (folder / part).is_dir()
    assert {name: os.environ[name] for name in SWITCHES} == SWITCHES


def test_the_name_tells_device_and_versions_and_is_a_plain_file_name() -> None:
    name = cache_name("cuda")
    assert name.startswith("planted-tm-gpu-9000-torch-2.")
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789.+-")


def test_another_device_or_version_compiles_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.11.0+cu130", "triton": "3.6.0"}
    names = {cache_name("cuda")}
    for changed in ({}, {"torch": "2.12.0"}, {"triton": "3.7.0"}, {"triton": None}):
        found = versions | changed
        monkeypatch.setattr(environment, "package_versions", lambda names, found=found: found)
        names.add(cache_name("cuda"))
    monkeypatch.setattr(environment, "device_name", lambda device: "another")
    names.add(cache_name("cuda"))
    assert len(names) == 6


@pytest.mark.parametrize("name", [*FOLDERS, *SWITCHES])
def test_what_the_user_set_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "the user's")
    use_kernel_caches(tmp_path, "cuda")
    assert os.environ[name] == "the user's"
    assert all(os.environ[other] for other in (*FOLDERS, *SWITCHES))


def test_the_next_runs_folder_of_a_process_has_its_own(tmp_path: Path) -> None:
    for name in ("one", "two", "two"):
        folder = use_kernel_caches(tmp_path / name, "cuda")
        assert os.environ["TRITON_CACHE_DIR"] == f"{folder}/triton"
        assert str(tmp_path / name) in os.environ["TRITON_CACHE_DIR"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "kernels").write_text("in the way")
    with pytest.raises(DiskError, match="kernels"):
        use_kernel_caches(tmp_path, "cuda")


def test_reading_tells_sizes_and_what_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_kernel_caches(tmp_path) == []
    folder = use_kernel_caches(tmp_path, "cuda")
    assert folder is not None
    (folder / "triton" / "deep").mkdir()
    (folder / "triton" / "deep" / "kernel.cubin").write_bytes(bytes(1000))
    (folder / "inductor" / "graph").write_bytes(bytes(24))
    other = kernels_folder(tmp_path) / "another"
    other.mkdir()
    outside = tmp_path / "elsewhere"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(outside))
    found = {cache.name: cache for cache in read_kernel_caches(tmp_path)}
    assert set(found) == {folder.name, "another", str(outside)}
    ours = found[folder.name]
    assert (ours.num_bytes, ours.num_files, ours.in_use) == (1024, 2, True)  # inductor's, still
    assert not found["another"].in_use
    assert found[str(outside)].in_use
    assert found[str(outside)].num_bytes == 0


@pytest.mark.slow
def test_a_later_process_takes_what_an_earlier_one_compiled(tmp_path: Path) -> None:
    """With torch's own compiler, for the CPU: forward and backward come from the folder."""
    counts = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", COMPILES, str(tmp_path)],
            capture_output=True,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout)
        assert found["on"] == [True, True]
        counts.append(found["counts"])
    assert counts[0].get("autograd_cache_miss") == 1
    assert counts[0].get("autograd_cache_hit", 0) == 0
    assert counts[1].get("autograd_cache_hit") == 1
    assert "fxgraph_cache_miss" not in counts[1]
    (cache,) = read_kernel_caches(tmp_path)
    assert cache.num_files > 2
