"""What a figure was measured on: versions, device, threads. A number without it is worthless."""

from __future__ import annotations

import os
import platform
import resource
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from workbench.errors import FieldError

PACKAGES = (
    "lm-workbench",
    "torch",
    "transformers",
    "optuna",
    "triton",
    "mamba-ssm",
    "causal-conv1d",
    "flash-attn",
)

MEMINFO = Path("/proc/meminfo")
CONTROL_GROUPS = tuple(
    (folder / limit, folder / usage, folder / "memory.stat", cached)
    for folder, limit, usage, cached in (
        (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
        (
            Path("/sys/fs/cgroup/memory"),
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    )
)


def package_versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Installed versions by distribution name; None for what is not installed."""
    return {name: _version(name) for name in names}


@cache
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@lru_cache
def processor_name() -> str:
    """The CPU's model name, as the kernel tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the platform module knows less, but something
    return platform.processor() or platform.machine()


def resolve_device(name: str) -> str:
    """`"auto"` → `"cuda"` where there is one, else `"cpu"`; anything else is checked.

    Raises:
        FieldError: not a device, or not there.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise FieldError(
            "device", f"{name!r} is no device: use auto, cpu, cuda or cuda:N"
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise FieldError("device", f"{name!r} was asked for, and torch sees no CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise FieldError("device", f"{name!r}: there are {torch.cuda.device_count()} CUDA devices")
    return name


def device_name(device: str) -> str:
    """The device's product name."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return processor_name()


def available_memory(device: str) -> int:
    """Bytes that this process may still take on a device, as far as the system tells.

    For a CPU the least of what is free or can be freed, what the process's control group still
    allows (containers), and a limit on its address space (`ulimit -v`).
    """
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    limits = [_free_memory(), *_control_group_room()]
    return min(limits if address_space == resource.RLIM_INFINITY else [*limits, address_space])


def _free_memory() -> int:
    try:
        for line in MEMINFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: all of it is the best that is known
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _control_group_room() -> list[int]:
    """Limit less usage of the control group, cached files not counted; of version 2, or 1."""
    room = []
    for limit, usage, statistics, cached in CONTROL_GROUPS:
        try:
            facts = dict(
                line.split() for line in statistics.read_text(encoding="utf-8").splitlines()
            )
            used = int(usage.read_text()) - int(facts.get(cached, 0))
            room.append(int(limit.read_text()) - used)
        except (OSError, ValueError):
            continue  # there is no such controller, or it says "max": no limit
    return room


def environment(device: str) -> dict[str, Any]:
    """JSON facts of this process for a record."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cuda": torch.version.cuda,
        "versions": package_versions(),
    }
