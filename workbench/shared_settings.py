"""Global settings that figures depend on: read, compared and put back."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

TINY = 5e-324  # the smallest float above 0: a denormal


class Setting(NamedTuple):
    """A setting in words, how it is read, and how it is written."""

    name: str
    get: Callable[[], Any]
    set: Callable[[Any], object]


def read_settings() -> list[Any]:
    """The values of all settings, in a fixed order."""
    return [setting.get() for setting in _settings()]


def write_settings(before: list[Any]) -> list[str]:
    """Put back what differs from `before`; a line for each that did."""
    changes = []
    for setting, old in zip(_settings(), before, strict=True):
        new = setting.get()
        if new != old:
            setting.set(old)
            changes.append(f"{setting.name}: {old} became {new}")
    return changes


@lru_cache(maxsize=1)
def _settings() -> tuple[Setting, ...]:
    import torch

    def set_device(device: Any) -> None:
        # Given "cpu", torch would route every call through a mode; None is the same, for free.
        torch.set_default_device(None if device.type == "cpu" else device)

    def set_deterministic(value: tuple[bool, bool]) -> None:
        torch.use_deterministic_algorithms(value[0], warn_only=value[1])

    return (
        # First: a mode may intercept how the others are read.
        Setting("torch's function modes", lambda: len(_modes()), _drop_modes),
        Setting("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype),
        Setting("torch's default device", torch.get_default_device, set_device),
        Setting("torch's grad mode", torch.is_grad_enabled, torch.set_grad_enabled),
        Setting("torch's number of threads", torch.get_num_threads, torch.set_num_threads),
        Setting(
            "torch's deterministic algorithms (on, only warn)",
            lambda: (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            set_deterministic,
        ),
        Setting(
            "torch's float32 matmul precision",
            torch.get_float32_matmul_precision,
            torch.set_float32_matmul_precision,
        ),
        Setting(
            "torch's anomaly detection", torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly
        ),
        *(_autocast(device) for device in ("cpu", "cuda")),
        *_backends(),
        Setting(
            "denormal numbers",
            lambda: TINY * 1.0 != 0.0,
            lambda on: torch.set_flush_denormal(not on),
        ),
        Setting("the working directory", os.getcwd, os.chdir),
    )


def _autocast(device: str) -> Setting:
    import torch

    def read() -> tuple[bool, torch.dtype]:
        return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def write(value: tuple[bool, torch.dtype]) -> None:
        torch.set_autocast_enabled(device, value[0])
        torch.set_autocast_dtype(device, value[1])

    return Setting(f"torch's autocast on {device}", read, write)


def _backends() -> list[Setting]:
    from torch import backends

    def attribute(owner: Any, name: str) -> Setting:
        label = f"{getattr(owner, '__name__', None) or 'torch.backends.cuda.matmul'}.{name}"
        return Setting(
            label, lambda: getattr(owner, name), lambda value: setattr(owner, name, value)
        )

    kernels = [
        (f"{name} attention", getattr(backends.cuda, f"{name}_sdp_enabled"), f"enable_{name}_sdp")
        for name in ("flash", "math", "mem_efficient", "cudnn")
    ]
    return [
        *(
            attribute(backends.cudnn, name)
            for name in ("enabled", "benchmark", "deterministic", "allow_tf32")
        ),
        attribute(backends.cuda.matmul, "allow_tf32"),
        attribute(backends.mkldnn, "enabled"),
        *(
            Setting(f"torch's {name}", get, getattr(backends.cuda, set_name))
            for name, get, set_name in kernels
        ),
    ]


def _modes() -> list[Any]:
    """The function modes that are entered, but for the one that holds the default device."""
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext

    stack = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return [mode for mode in stack if not isinstance(mode, DeviceContext)]


def _drop_modes(count: int) -> None:
    from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode

    surplus = _modes()[count:]
    stack = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    for _ in stack:
        _pop_mode()  # type: ignore[no-untyped-call]
    for mode in stack:
        if not any(mode is other for other in surplus):
            _push_mode(mode)  # type: ignore[no-untyped-call]
