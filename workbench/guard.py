"""Keeps a plugin from changing what all plugins share: torch, the workbench, each other's code.

A `Guard` notes functions, classes and settings when it is made; `restore` finds what has become of
them since, puts it back and says what it was. Making one takes milliseconds, so that whoever needs
one again and again keeps it, and says by `renew` that it begins anew. It is no wall against malice,
only against the patches and global settings that make one plugin's figures depend on another's
presence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
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
TORCH = frozenset({
    *FUNCTIONS, "torch.autograd", "torch.autograd.function", "torch.fft", "torch.functional",
    "torch.linalg", "torch.nn", "torch.nn.functional", "torch.nn.init", "torch.nn.parameter",
    "torch.nn.utils.clip_grad", "torch.random", "torch.special",
})  # fmt: skip
TORCH_PACKAGES = ("torch.nn.modules", "torch.optim")
CORE = "workbench"
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

    In torch, whatever is not as before is a change, and in the workbench what is not its own. In
    a plugin's package it is the workbench's code and that of the other packages: anything else
    may have been put there by the plugin itself, as by one that looks for a faster function at
    its first use, and lets a name of its own stand for it. Who put it there cannot be told from
    what is there. So it goes unnoticed where a plugin deletes a name of another one, or gives it
    a value that is no plugin's code: a constant, or a function of torch or a third package.

    Args:
        packages: top-level packages of plugins, to be watched besides torch and the workbench.
    """

    def __init__(self, packages: Iterable[str] = ()) -> None:
        import torch

        self._packages = frozenset({CORE, *packages})
        self._spaces: dict[int, _Namespace] = {}
        self._modules: dict[str, ModuleType] = {}
        self._seen: set[str] = set()
        self._tensor = torch.Tensor
        self._watch_modules()
        self._note_settings()

    def renew(self) -> None:
        """Note everything anew, as a guard that is made now would: what has changed may stay."""
        if not self._same_names():
            for space in self._spaces.values():
                space.remember()
            self._watch_new_classes()
        self._watch_modules()
        self._note_settings()

    def _note_settings(self) -> None:
        self._hooks = [(name, found, dict(found)) for name, found in _global_hooks()]
        self._settings = read_settings()
        self._generators = _generator_states()
        self._filters = list(warnings.filters)

    def restore(self) -> list[Change]:
        """Put back what has changed since this was made or renewed, and say what that was."""
        # Settings first: torch.Storage, for one, follows the default dtype.
        changes = [Change(text) for text in write_settings(self._settings)]
        if not self._same_names():
            changes += [change for space in self._spaces.values() for change in space.restore()]
            self._watch_new_classes()
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

    def _same_names(self) -> bool:
        """Whether all names stand for what they stood for: the one path when all is well."""
        if sum(map(len, self._now)) != len(self._before):
            return False
        return all(map(operator.is_, itertools.chain.from_iterable(self._now), self._before))

    def _note_names(self) -> None:
        # Views of the namespaces themselves: thousands of names are compared in one go.
        self._now = [vars(space.owner).values() for space in self._spaces.values()]
        self._before = list(itertools.chain.from_iterable(self._now))

    def _watch_modules(self) -> None:
        """Take in what was imported meanwhile, be it again."""
        now, known = sys.modules, self._modules
        as_before = map(operator.is_, map(now.get, known, known.values()), known.values())
        if self._seen.issuperset(now) and all(as_before):
            return
        new = now.keys() - self._seen
        again = {name for name, module in known.items() if now.get(name, module) is not module}
        for name in sorted(new | again):
            if (own := self._package_of(name)) is not None and isinstance(now[name], ModuleType):
                known[name] = now[name]
                self._watch_names(now[name], name, own)
                self._watch_classes(name, own)
        self._seen |= new
        self._watch_class(self._tensor, "")
        self._note_names()

    def _watch_new_classes(self) -> None:
        """Take in what modules have defined meanwhile."""
        for name in self._modules:
            self._watch_classes(name, self._package_of(name) or "")
        self._note_names()

    def _package_of(self, name: str) -> str | None:
        """The top-level package of a module that is watched; empty for torch, None for others."""
        if name in TORCH or name.startswith(TORCH_PACKAGES):
            return ""
        top = name.partition(".")[0]
        return top if top in self._packages else None

    def _watch_classes(self, name: str, own: str) -> None:
        values = () if name in FUNCTIONS else list(vars(self._modules[name]).values())
        for value in values:
            if isinstance(value, type) and value.__module__ == name:
                self._watch_class(value, own)

    def _watch_class(self, owner: type, own: str) -> None:
        if id(owner) not in self._spaces:
            self._watch_names(owner, f"{owner.__module__}.{owner.__qualname__}", own)

    def _watch_names(self, owner: ModuleType | type, name: str, own: str) -> None:
        packages = self._packages if own not in ("", CORE) else None
        self._spaces[id(owner)] = _Namespace(owner, name, own, packages)


class _Namespace:
    """The names of one module or class.

    Args:
        own: the top-level package whose code may stand there; empty for none.
        packages: whose code may not, but for `own`; None for everybody's.
    """

    def __init__(self, owner: Any, name: str, own: str, packages: frozenset[str] | None) -> None:
        self.owner, self.name, self.own, self.packages = owner, name, own, packages
        self.is_class = isinstance(owner, type)
        self.remember()

    def remember(self) -> None:
        """Take what is there now for what was there before."""
        names = vars(self.owner)
        self.names, self.values = tuple(names), tuple(names.values())

    def restore(self) -> Iterator[Change]:
        now = vars(self.owner)
        if len(now) == len(self.values) and all(map(operator.is_, now.values(), self.values)):
            return
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
        self.remember()

    def _matters(self, old: Any, new: Any) -> bool:
        # Of values, those of torch's own types: dtypes, layouts, the default generator.
        if not (callable(old) or isinstance(old, _KINDS) or type(old).__module__ == "torch"):
            return False
        top = _code_of(new)[0].partition(".")[0]
        if self.own and top == self.own:
            return False
        if self.packages is not None:
            return top in self.packages
        return not _is_torchs_own(old, new)

    def _change(self, name: str, new: Any) -> Change:
        full = f"{self.name}.{name}"
        if new is MISSING:
            return Change(f"{full} was deleted")
        module, label, where = _code_of(new)
        return Change(f"{full} became {label}", module, where)


_KINDS = (property, staticmethod, classmethod, ModuleType)
_WRAPPERS = (functools.partial, functools.partialmethod, functools.cached_property)


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
    if isinstance(value, _WRAPPERS):
        value = value.func
    function = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
    is_module = isinstance(function, ModuleType)
    module = str(getattr(function, "__name__" if is_module else "__module__", None) or "")
    label = str(getattr(function, "__qualname__", None) or repr(value))
    code = getattr(function, "__code__", None)
    where = f'File "{code.co_filename}", line {code.co_firstlineno}' if code else ""
    line = f", line {code.co_firstlineno}" if code else ""
    return module, f"{label} ({module}{line})" if module else label, where


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
    if numpy_random := sys.modules.get("numpy.random"):
        states.append((numpy_random.set_state, numpy_random.get_state()))
    else:  # numpy imports it at its first use, and then seeds it from the system
        states.append((_reseed_numpy, None))
    return states


def _reseed_numpy(_: None) -> None:
    if numpy_random := sys.modules.get("numpy.random"):
        numpy_random.seed()


@contextlib.contextmanager
def guarded(
    what: str, packages: Iterable[str] = (), *, guard: Guard | None = None
) -> Iterator[None]:
    """Inside, nothing that plugins share may change; what did is put back in any case.

    What is printed to standard output inside goes to standard error.

    Args:
        what: runs inside, for the message.
        packages: as a `Guard` takes them.
        guard: one that is there already, and is renewed; without it one is made of `packages`.

    Raises:
        PatchError: the block ended well, and something had changed.
    """
    if guard is None:
        guard = Guard(packages)
    else:
        guard.renew()
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
