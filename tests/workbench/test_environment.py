"""What a figure was measured on: versions, device, memory, threads."""

from __future__ import annotations

import json
import os
import platform
import resource
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from workbench import FieldError, environment
from workbench.environment import (
    available_memory,
    package_versions,
    processor_name,
    resolve_device,
)

NOWHERE = (Path("/nowhere/limit"), Path("/nowhere/usage"), Path("/nowhere/stat"), "x")


def test_versions_are_those_installed_and_null_where_there_is_none() -> None:
    found = package_versions(("torch", "pluggy", "a-package-that-is-not-there"))
    assert found == {
        "torch": version("torch"),
        "pluggy": version("pluggy"),
        "a-package-that-is-not-there": None,
    }


def test_the_record_is_json_with_device_and_versions() -> None:
    facts = environment.environment("cpu")
    assert json.loads(json.dumps(facts)) == facts
    assert facts["device"] == "cpu"
    assert facts["device_name"] == processor_name()
    assert facts["python"] == platform.python_version()
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cores"] == os.cpu_count()
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["lm-workbench"]


def test_the_processor_has_a_name() -> None:
    assert processor_name().strip()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and "model name" in cpuinfo.read_text():
        assert processor_name() in cpuinfo.read_text()


def test_devices_are_resolved() -> None:
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


def test_auto_prefers_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == "cuda"
    assert resolve_device("cuda:1") == "cuda:1"
    with pytest.raises(FieldError, match="there are 2 CUDA devices"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "cpu:x", "", "cuda:-1"])
def test_what_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(FieldError, match="use auto, cpu, cuda or cuda:N"):
        resolve_device(name)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FieldError, match="torch sees no CUDA device"):
        resolve_device("cuda")


def test_available_memory_is_at_most_what_there_is() -> None:
    there_is = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 2**20 < available_memory("cpu") <= there_is


def test_available_memory_is_what_the_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 4096 kB\nMemFree: 512 kB\nMemAvailable:    1024 kB\n")
    monkeypatch.setattr(environment, "MEMINFO", meminfo)
    monkeypatch.setattr(environment, "CONTROL_GROUPS", (NOWHERE,))
    assert available_memory("cpu") == 2**20
    monkeypatch.setattr(environment, "MEMINFO", tmp_path / "absent")
    assert available_memory("cpu") == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("limit", "room"), [("1000000", 1_000_000 - (600_000 - 200_000)), ("max", None)]
)
def test_a_container_limits_memory_less_its_cached_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, room: int | None
) -> None:
    for name, text in (
        ("max", limit), ("current", "600000"), ("stat", "anon 1\ninactive_file 200000"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text + "\n")
    unlimited = available_memory("cpu")
    group = (tmp_path / "max", tmp_path / "current", tmp_path / "stat", "inactive_file")
    monkeypatch.setattr(environment, "CONTROL_GROUPS", (NOWHERE, group))
    if room is None:
        assert available_memory("cpu") == pytest.approx(unlimited, rel=0.2)
    else:
        assert available_memory("cpu") == room


def test_a_limit_on_the_address_space_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (12345, resource.RLIM_INFINITY))
    assert available_memory("cpu") == 12345


def test_a_gpu_says_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 99))
    assert available_memory("cuda:0") == 7
