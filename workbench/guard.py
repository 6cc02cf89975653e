"""Keeps a plugin from changing what all plugins share: torch, the workbench, each other's code.

A `Guard` notes functions, classes and settings when it is made; `restore` finds what has become of
them since, puts it back and says what it was. It is no wall against malice, only against the
patches and global settings that make one plugin's figures depend on another's presence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

from workbench import stray_output
from workbench.errors import PatchError
from workbench.shared_settings import read_settings, write_settings

FUNCTIONS = ("torch", "torch.nn.utils", "builtins", "math")  # of these, no class is watched
TORCH = (
    *FUNCTIONS, "torch.autograd", "torch.autograd.function", "torch.fft", "torch.functional",
    "torch.linalg", "torch.nn", "torch.nn.functional", "torch.nn.init", "torch.nn.parameter",
    "torch.nn.utils.clip_grad", "torch.random", "torch.special",
)  # fmt: skip
TORCH_PACKAGES = ("torch.nn.modules", "torch.optim")
MISSING = object()


@dataclasses.dataclass(frozen=True)
class Change:
    """One thing that was not as before.

    Attributes:
        what: in words, with the old name and what it had become.
        module: the code that took its place lies in this module; empty if unknown.
        where: file and line of that code; empty if unknown.
    """

    what: str
    module: str = ""
    where: str = ""


class Guard:
    """What plugins share, as it is now.

    Args:
        packages: top-level packages to watch besides torch. Code of such a package may change
            the package itself, and nothing else.
    """

    def __init__(self, packages: Iterable[str] = ()) -> None:
        import torch

        self._packages = frozenset({"workbench", *packages})
        self._spaces: dict[int, _Namespace] = {}
        self._modules: dict[str, ModuleType] = {}
        self._count = 0
        self._tensor = torch.Tensor
        self._watch_modules()
        self._remember()

    def _remember(self) -> None:
        self._hooks = [(name, found, dict(found)) for name, found in _global_hooks()]
        self._settings = read_settings()
        self._generators = _generator_states()
        self._filters = list(warnings.filters)

    def restore(self) -> list[Change]:
        """Put back what has changed since this was made, and say what that was."""
        # Settings first: torch.Storage, for one, follows the default dtype.
        changes = [Change(text) for text in write_settings(self._settings)]
        changes += [change for space in self._spaces.values() for change in space.restore()]
        for name, found, before in self._hooks:
            if not _same(found, before):
                changes.append(Change(f"{name} holds other hooks"))
                found.clear()
                found.update(before)
        for restore, state in self._generators:
            restore(state)
        # Others are of no effect on figures; an "error" would break whoever warns.
        added = [entry for entry in warnings.filters if entry not in self._filters]
        for entry in added:
            if entry[0] == "error":
                warnings.filters.remove(entry)  # type: ignore[attr-defined]
        self._watch_modules()
        return changes

    def _watch_modules(self) -> None:
        """Take in what was imported meanwhile."""
        if len(sys.modules) == self._count:
            return
        self._count = len(sys.modules)
        for name, module in list(sys.modules.items()):
            self.watch(name, module)
        self._watch_class(self._tensor, "")

    def watch(self, name: str, module: ModuleType) -> None:
        """Watch a module from now on, if it is one of those to watch."""
        top = name.partition(".")[0]
        torchs = name in TORCH or name.startswith(TORCH_PACKAGES)
        if not torchs and top not in self._packages:
            return
        if self._modules.get(name) is module or not isinstance(module, ModuleType):
            return
        self._modules[name] = module
        own = "" if torchs else top
        self._spaces[id(module)] = _Namespace(module, name, own)
        for value in () if name in FUNCTIONS else list(vars(module).values()):
            if isinstance(value, type) and value.__module__ == name:
                self._watch_class(value, own)

    def _watch_class(self, owner: type, own: str) -> None:
        if id(owner) not in self._spaces:
            name = f"{owner.__module__}.{owner.__qualname__}"
            self._spaces[id(owner)] = _Namespace(owner, name, own)


class _Namespace:
    """The names of one module or class."""

    def __init__(self, owner: Any, name: str, own: str) -> None:
        self.owner, self.name, self.own = owner, name, own
        self.is_class = isinstance(owner, type)
        self._remember()

    def _remember(self) -> None:
        names = vars(self.owner)
        self.names, self.values = tuple(names), tuple(names.values())

    def restore(self) -> Iterator[Change]:
        now = vars(self.owner)
        if len(now) == len(self.values) and all(map(operator.is_, now.values(), self.values)):
            return  # the one path that is taken when all is well: it has to be quick
        for name, old in zip(self.names, self.values, strict=True):
            new = now.get(name, MISSING)
            if new is not old and self._matters(old, new):
                yield self._change(name, new)
                setattr(self.owner, name, old)
        if self.is_class:
            for name in [name for name in now if name not in set(self.names)]:
                old = _inherited(self.owner, name)
                if old is not MISSING and self._matters(old, now[name]):
                    yield self._change(name, now[name])
                    delattr(self.owner, name)
        self._remember()

    def _matters(self, old: Any, new: Any) -> bool:
        # Of values, those of torch's own types: dtypes, layouts, the default generator.
        if not (callable(old) or isinstance(old, _KINDS) or type(old).__module__ == "torch"):
            return False
        module = str(_code_of(new)[0])
        return not (_is_torchs_own(old, new) or (self.own and _top(module) == self.own))

    def _change(self, name: str, new: Any) -> Change:
        full = f"{self.name}.{name}"
        if new is MISSING:
            return Change(f"{full} was deleted")
        module, label, where = _code_of(new)
        return Change(f"{full} became {label}", module, where)


_KINDS = (property, staticmethod, classmethod, ModuleType)


def _inherited(owner: type, name: str) -> Any:
    for base in owner.__mro__[1:]:
        if name in vars(base):
            return vars(base)[name]
    return MISSING


def _is_torchs_own(old: Any, new: Any) -> bool:
    """Torch wraps its optimizers' steps at their first use, and others for its compiler."""
    if getattr(new, "__module__", None) == "torch._dynamo.mutation_guard":
        return True
    code = getattr(getattr(new, "__code__", None), "co_filename", "")
    by_torch = getattr(new, "hooked", False) or code.endswith(os.path.join("torch", "_compile.py"))
    if by_torch and getattr(new, "__wrapped__", None) is old:
        return True
    return _unshielded(new) is _unshielded(old)


def _unshielded(function: Any) -> Any:
    """What dynamo was told to leave alone, without what tells it so."""
    while getattr(function, "_torchdynamo_disable", False):
        inner = getattr(function, "_torchdynamo_orig_callable", None)
        if inner is None:
            break
        function = inner
    return function


def _code_of(value: Any) -> tuple[str, str, str]:
    """Module, name and place of the code that a value stands for."""
    function = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
    module = str(getattr(function, "__module__", None) or "")
    label = str(getattr(function, "__qualname__", None) or repr(value))
    code = getattr(function, "__code__", None)
    where = f'File "{code.co_filename}", line {code.co_firstlineno}' if code else ""
    line = f", line {code.co_firstlineno}" if code else ""
    return module, f"{label} ({module}{line})" if module else label, where


def _top(module: str) -> str:
    return module.partition(".")[0]


def _same(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    return list(now) == list(before) and all(map(operator.is_, now.values(), before.values()))


def _global_hooks() -> Iterator[tuple[str, dict[Any, Any]]]:
    """Torch's tables of hooks that run in every module or optimizer."""
    for module in ("torch.nn.modules.module", "torch.optim.optimizer"):
        for name, value in vars(sys.modules[module]).items():
            if name.startswith("_global_") and isinstance(value, dict):
                yield f"{module}.{name}", value


def _generator_states() -> list[tuple[Callable[[Any], object], Any]]:
    """The global random generators of the CPU, each with what puts it back."""
    import torch

    states: list[tuple[Callable[[Any], object], Any]] = [
        (random.setstate, random.getstate()),
        (torch.set_rng_state, torch.get_rng_state()),
    ]
    if numpy := sys.modules.get("numpy"):
        states.append((numpy.random.set_state, numpy.random.get_state()))
    return states


@contextlib.contextmanager
def guarded(what: str, packages: Iterable[str] = ()) -> Iterator[None]:
    """Inside, nothing that plugins share may change; what did is put back in any case.

    What is printed to standard output inside goes to standard error.

    Args:
        what: runs inside, for the message.

    Raises:
        PatchError: the block ended well, and something had changed.
    """
    guard = Guard(packages)
    try:
        with stray_output.apart():
            yield
    except BaseException:
        guard.restore()
        raise
    if changes := guard.restore():
        raise PatchError(f"{what} {describe_changes(changes)}")


def describe_changes(changes: list[Change]) -> str:
    """`changed what all plugins share: …`, to follow a name."""
    shown = "; ".join(change.what for change in changes[:4])
    more = f"; and {len(changes) - 4} more" if len(changes) > 4 else ""
    return (
        f"changed what all plugins share: {shown}{more}. It was put back. A plugin must bring "
        "functions and settings of its own instead."
    )
