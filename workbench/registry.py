"""Registries: one name, one thing, with where it came from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from workbench.discovery import Failure, Provenance
from workbench.errors import PluginError, UnknownNameError

T = TypeVar("T")
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")


class Registry(Generic[T]):
    """The things of one kind that plugins offer, by name.

    Args:
        kind: what they are, for messages (`"layer"`).
        check: raises TypeError or ValueError for a thing that breaks its contract.
        failures: plugins that did not load: an unknown name may be theirs, so errors mention them.
    """

    def __init__(
        self, kind: str, check: Callable[[Any], None], failures: Mapping[str, Failure]
    ) -> None:
        self.kind = kind
        self._check = check
        self._failures = failures
        self._things: dict[str, T] = {}
        self._provenance: dict[str, Provenance] = {}

    def register_for(self, provenance: Provenance) -> Callable[[str, T], None]:
        """The `register` that one plugin's hook is given."""

        def register(name: str, thing: T, /) -> None:
            self.add(name, thing, provenance)

        return register

    def add(self, name: str, thing: T, provenance: Provenance) -> None:
        """Add one thing.

        Raises:
            PluginError: the name is taken; says by whom.
            TypeError, ValueError: a malformed name, or a thing that breaks its contract.
        """
        if not (isinstance(name, str) and NAME.fullmatch(name)):
            raise ValueError(
                f"{self.kind} name {name!r}: use lower case letters, digits, '_', '-' and '.'"
            )
        if name in self._things:
            first, second = self._provenance[name], provenance
            raise PluginError(
                f"two plugins offer a {self.kind} called {name!r}: {first.plugin} "
                f"({first.file}) and {second.plugin} ({second.file}). "
                f"WORKBENCH_DISABLE={second.plugin} leaves the second out."
            )
        self._check(thing)
        self._things[name] = thing
        self._provenance[name] = provenance

    def drop(self, plugin: str) -> None:
        """Take out everything that a plugin registered."""
        for name in [name for name, origin in self._provenance.items() if origin.plugin == plugin]:
            del self._things[name], self._provenance[name]

    def __getitem__(self, name: str) -> T:
        """The thing of that name.

        Raises:
            UnknownNameError: nothing has it; says what is near and which plugins failed to load.
        """
        if name not in self._things:
            hint = "".join(
                f" Plugin {failure.plugin!r} did not load ({failure.reason}); "
                "`workbench plugins --traceback` shows where."
                for failure in self._failures.values()
            ).strip()
            raise UnknownNameError(self.kind, name, self._things, hint)
        return self._things[name]

    def __contains__(self, name: object) -> bool:
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._things))

    def __len__(self) -> int:
        return len(self._things)

    def provenance(self, name: str) -> Provenance:
        """Where the thing of that name came from."""
        self[name]
        return self._provenance[name]
