"""`workbench doctor`: what works on this machine, and how to get what does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Cli
from workbench import kernel_caches, kernels
from workbench.kernel_caches import FOLDERS, SWITCHES, kernels_folder
from workbench.kernels import Backend, Operation


@pytest.fixture(autouse=True)
def no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (kernels.VARIABLE, *FOLDERS, *SWITCHES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(kernel_caches, "_set_here", {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_one_line_says_so(cli: Cli) -> None:
    result = cli("doctor")
    assert result.status == 0
    (line,) = [line for line in result.out.splitlines() if "No CUDA device" in line]
    assert "everything runs on torch" in line
    assert all(name in line for name in ("ssd", "selective_scan", "attention", "causal_conv1d"))
    assert "there is no CUDA device" not in result.out  # not again for each


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_json_has_every_backend(cli: Cli) -> None:
    rows = {
        (row["operation"], row["backend"]): row for row in cli("doctor", "--json").json["backends"]
    }
    assert rows["ssd", "torch"]["works"]
    mamba = rows["ssd", "mamba-ssm"]
    assert (mamba["works"], mamba["reason"]) == (False, "there is no CUDA device")
    assert mamba["install"].startswith("pip install")


def test_a_table_says_what_works_and_what_to_do(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device is planted, with one library that works and one that does not."""

    def breaks() -> None:
        raise ImportError("no kernels")

    monkeypatch.setattr(kernels, "_operations", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr("workbench.environment.resolve_device", lambda name: "cuda")
    monkeypatch.setattr("workbench.environment.device_name", lambda device: "a planted device")
    monkeypatch.setattr("workbench.environment.available_memory", lambda device: 2**30)
    monkeypatch.setenv(kernels.VARIABLE, "scan=torch")
    fast = Backend(name="fast", probe=lambda: None)
    broken = Backend(name="broken", probe=breaks, install="pip install broken")
    Operation("scan", [broken, fast], home=__name__)
    rows = [line.split(maxsplit=3) for line in cli("doctor").out.splitlines()]
    assert ["operation", "backend", "works", "why not, and what to do"] in rows
    assert ["scan", "broken", "no", "ImportError: no kernels; pip install broken"] in rows
    assert ["scan", "fast", "yes"] in rows
    assert ["scan", "torch", "yes"] in rows
    assert "WORKBENCH_BACKENDS demands torch of scan." in cli("doctor").out
    (cache,) = cli("doctor", "--json").json["kernel_caches"]  # what trying them has compiled
    assert cache["name"].startswith("a-planted-device-torch-")
    assert cache["in_use"]
    assert cli("doctor", "--json").json["demanded_backends"] == {"scan": "torch"}


def test_a_slip_in_the_environment_is_told(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "ssd=trtion")
    assert "WORKBENCH_BACKENDS.ssd 'trtion'. Did you mean 'triton'" in cli("doctor").refused()


def test_compiled_kernels_are_told_with_their_size(cli: Cli, tmp_path: Path) -> None:
    assert "compiled kernels" not in cli("doctor", "--runs", str(tmp_path)).out
    folder = kernels_folder(tmp_path / ".cache")
    (folder / "some-gpu-torch-2.11.0" / "triton").mkdir(parents=True)
    (folder / "some-gpu-torch-2.11.0" / "triton" / "kernel").write_bytes(bytes(3 * 2**20))
    out = cli("doctor", "--runs", str(tmp_path)).out
    (row,) = [line.split() for line in out.splitlines() if line.startswith("some-gpu")]
    assert row == ["some-gpu-torch-2.11.0", "3.000", "MiB", "1"]
    assert f"Kept in {folder}; delete it" in " ".join(out.split())
    (cache,) = cli("doctor", "--runs", str(tmp_path), "--json").json["kernel_caches"]
    assert (cache["num_bytes"], cache["num_files"], cache["in_use"]) == (3 * 2**20, 1, False)
