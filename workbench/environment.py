"""What a figure was measured on: versions, device, threads. A number without it is worthless."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
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


def package_versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Installed versions by distribution name; None for what is not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


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
