"""Which implementation of an operation runs: found once, overridable, and said in every record.

An operation (a scan, attention) always runs on torch. Where another library's kernels work on the
device, they are preferred, in the order in which the operation lists them. Two settings change
that: a study's `[runtime.backends]` table, and the environment variable `WORKBENCH_BACKENDS`,
which overrides it, as `ssd=torch,attention=flash-attn`, or one name for all operations.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch

from workbench.errors import FieldError, PluginError, UnknownNameError, WorkbenchError

TORCH = "torch"
VARIABLE = "WORKBENCH_BACKENDS"
FIELD = "runtime.backends"  # of a study

Function = TypeVar("Function", bound=Callable[..., Any])

# Operation → backend, from a study; what the environment says goes before it.
_preferred: dict[str, str] = {}
_operations: dict[str, Operation] = {}


def constant(function: Function) -> Function:
    """Make a function's result a constant to torch.compile.

    `torch.compiler.assume_constant_result` does the same, but loads the compiler: seconds, at the
    import of every layer.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation of an operation.

    Attributes:
        name: the library's, such as `mamba-ssm`.
        probe: runs it on a tiny CUDA tensor; raises whatever it raises where it does not work. An
            import alone proves nothing: some releases import without their compiled kernels.
        install: how to get it.
    """

    name: str
    probe: Callable[[], object]
    install: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """Whether a backend of an operation works on this machine's CUDA device, and why not."""

    operation: str
    backend: str
    works: bool
    reason: str = ""
    install: str = ""


class Operation:
    """An operation and its implementations besides torch's, the preferred first.

    Defining one makes its name known to studies and `workbench doctor`.

    Args:
        home: the module that defines it, its `__name__`.

    Raises:
        PluginError: another module defines one of that name.
    """

    def __init__(self, name: str, backends: Sequence[Backend], *, home: str) -> None:
        self.name = name
        self.home = home
        earlier = _operations[name].home if name in _operations else home
        if earlier != home:
            raise PluginError(
                f"operation {name!r} is defined by {earlier} and by {home}: give one another name"
            )
        self.backends = {backend.name: backend for backend in backends}
        self._reasons: dict[str, str] = {}
        _operations[name] = self

    @property
    def package(self) -> str:
        """The top-level package that defines it."""
        return self.home.partition(".")[0]

    def why_not(self, backend: str) -> str:
        """Why a backend does not work here; empty if it does. Probes once a process."""
        if backend == TORCH:
            return ""
        if backend not in self._reasons:
            self._reasons[backend] = _try(self.backends[backend])
        return self._reasons[backend]

    def choose(self, able: Sequence[str]) -> str:
        """The backend to run on, of those that can take the call (torch's always can).

        Args:
            able: backends that take these dtypes and sizes.

        Raises:
            WorkbenchError: a setting demands one that does not work here.
        """
        wanted = self.demanded()
        if wanted is not None:
            return wanted if wanted in able else TORCH
        usable = (name for name in self.backends if name in able and not self.why_not(name))
        return next(usable, TORCH)

    def order(self) -> tuple[str, ...]:
        """The backends that calls run on here, each if those before it cannot take a call.

        Raises:
            WorkbenchError: a setting demands one that does not work here.
        """
        wanted = self.demanded()
        if wanted is not None:
            return tuple(dict.fromkeys((wanted, TORCH)))
        return (*(name for name in self.backends if not self.why_not(name)), TORCH)

    def demanded(self) -> str | None:
        """The backend that a setting demands, and that works; None if none is demanded.

        Raises:
            WorkbenchError: it does not work here.
        """
        wanted = preference(self.name)
        if wanted is None:
            return None
        if wanted != TORCH and wanted not in self.backends:
            raise UnknownNameError(f"backend of {self.name}", wanted, (TORCH, *self.backends))
        if reason := self.why_not(wanted):
            install = self.backends[wanted].install if torch.cuda.is_available() else ""
            raise WorkbenchError(
                f"{self.name} shall run on {wanted!r}, which does not work here: {reason}. "
                + (f"Install it with: {install}; or " if install else "")
                + f"leave it out of [{FIELD}] and {VARIABLE}."
            )
        return wanted


@constant
def choose(operation: str, able: tuple[str, ...]) -> str:
    """`Operation.choose` by name; a constant to torch.compile."""
    return _operations[operation].choose(able)


def operations() -> Mapping[str, Operation]:
    """Every operation that the loaded plugins define, by name."""
    return dict(_operations)


def statuses() -> list[Status]:
    """What every backend of every operation can do here, torch last; probes them all."""
    found = []
    for operation in _operations.values():
        for backend in (*operation.backends.values(), Backend(name=TORCH, probe=_always)):
            reason = operation.why_not(backend.name)
            found.append(
                Status(
                    operation=operation.name,
                    backend=backend.name,
                    works=not reason,
                    reason=reason,
                    install=backend.install,
                )
            )
    return found


def found() -> dict[str, dict[str, str]]:
    """What was probed so far: operation → backend → why it does not work, empty if it does."""
    return {name: dict(operation._reasons) for name, operation in _operations.items()}


def take_over(reasons: Mapping[str, Mapping[str, str]]) -> None:
    """Believe what another process on this machine, with the same plugins, has probed (`found`).

    What this process probed itself stays.
    """
    for name, backends in reasons.items():
        if operation := _operations.get(name):
            known = {key: why for key, why in backends.items() if key in operation.backends}
            operation._reasons = known | operation._reasons


def prefer(backends: Mapping[str, str]) -> None:
    """Set a study's preferences, in place of earlier ones.

    Raises:
        UnknownNameError: an operation or backend that no loaded plugin defines.
    """
    _check(backends, FIELD)
    if dict(backends) != _preferred:
        if compiler := sys.modules.get("torch._dynamo"):  # else nothing was compiled
            compiler.reset_code_caches()  # which have the earlier choice built in
        _preferred.clear()
        _preferred.update(backends)


def require(device: str) -> None:
    """Refuse what settings demand and a device cannot have, before any work on it.

    Raises:
        FieldError: the study demands a backend besides torch, and its device is no CUDA device.
        WorkbenchError: a setting demands a backend that does not work here.
    """
    if device.startswith("cuda"):
        for operation in _operations.values():
            operation.demanded()
        return
    # What the environment says concerns CUDA devices alone, but must be right.
    environment = _from_environment(os.environ.get(VARIABLE, "").strip(), frozenset(_operations))
    for name in _operations:
        wanted = _preferred.get(name, TORCH)
        if wanted != TORCH and name not in environment and "*" not in environment:
            raise FieldError(
                f"{FIELD}.{name}",
                f"{wanted!r} needs a CUDA device, and this runs on {device!r}: leave it out, "
                f"or set {VARIABLE}=torch for this run",
            )


def in_use(device: str, packages: Collection[str]) -> dict[str, list[str]]:
    """What the operations of some packages run on, on a device: operation → `Operation.order`.

    Empty without a CUDA device, where all run on torch. Probes.

    Args:
        packages: top-level, such as `workbench_mamba`.

    Raises:
        WorkbenchError: a setting demands a backend that does not work here.
    """
    if not device.startswith("cuda"):
        return {}
    return {
        name: list(operation.order())
        for name, operation in sorted(_operations.items())
        if operation.package in packages
    }


def preference(operation: str) -> str | None:
    """The backend that the environment or the study demands of an operation; None for neither."""
    demanded = _from_environment(os.environ.get(VARIABLE, "").strip(), frozenset(_operations))
    return demanded.get(operation, demanded.get("*", _preferred.get(operation)))


@lru_cache
def _from_environment(text: str, _known: frozenset[str]) -> dict[str, str]:
    """`{operation: backend}`, with `*` for one name that stands for all."""
    if not text:
        return {}
    demanded: dict[str, str] = {}
    for part in filter(str.strip, text.split(",")):
        operation, is_pair, backend = (piece.strip() for piece in part.partition("="))
        operation, backend = (operation, backend) if is_pair else ("*", operation)
        if operation in demanded:
            what = "all operations" if operation == "*" else operation
            raise WorkbenchError(
                f"{VARIABLE} names {demanded[operation]!r} and {backend!r} for {what}: name one"
            )
        demanded[operation] = backend
    known = {TORCH, *(name for operation in _operations.values() for name in operation.backends)}
    everywhere = demanded.get("*", TORCH)
    if everywhere not in known:
        raise UnknownNameError(f"backend in {VARIABLE}", everywhere, sorted(known))
    if everywhere != TORCH:
        # For all operations that have it; the others choose for themselves.
        del demanded["*"]
        for name, operation_ in _operations.items():
            if everywhere in operation_.backends:
                demanded.setdefault(name, everywhere)
    _check({name: value for name, value in demanded.items() if name != "*"}, VARIABLE)
    return demanded


def _check(backends: Mapping[str, str], where: str) -> None:
    for name, backend in backends.items():
        if name not in _operations:
            raise UnknownNameError(f"operation in {where}", name, sorted(_operations))
        if not isinstance(backend, str):
            raise FieldError(f"{where}.{name}", f"expected a backend's name, got {backend!r}")
        known = (TORCH, *_operations[name].backends)
        if backend not in known:
            raise UnknownNameError(f"backend in {where}.{name}", backend, known)


def _always() -> None:
    """The probe of torch itself."""


def _try(backend: Backend) -> str:
    """Why a probe fails; empty if it does not."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        # Whatever the caller is in the middle of: inference, mixed precision.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cuda", enabled=False),
        ):
            backend.probe()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""
