"""Errors that are the user's to mend: each says what is wrong, where, and what to do next."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class WorkbenchError(Exception):
    """A mistake in what the user gave (a file, a name, a value). The command line exits with 2."""

    def within(self, prefix: str) -> WorkbenchError:
        """The same error seen from outside: it lies in `prefix`."""
        return WorkbenchError(f"{prefix}: {self}")


class FieldError(WorkbenchError):
    """A value that cannot work, with the field that holds it.

    Args:
        field: dotted name of the field, as the user would write it (`mamba2.headdim`).
        message: what is wrong with it and what would be right.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message

    def within(self, prefix: str) -> FieldError:
        """The same error seen from outside: its field is a member of `prefix`."""
        return FieldError(f"{prefix}.{self.field}", self.message)


class UnknownNameError(WorkbenchError):
    """A name that nothing answers to: says the nearest one and lists them all."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        names = sorted(known)
        near = get_close_matches(name, names, n=1, cutoff=0.5)
        parts = [f"unknown {kind} {name!r}."]
        if near:
            parts.append(f"Did you mean {near[0]!r}?")
        parts.append(f"Known: {', '.join(names) if names else 'none'}.")
        if hint:
            parts.append(hint)
        super().__init__(" ".join(parts))
        self.kind = kind
        self.name = name
        self.known = names
        self.hint = hint

    def within(self, prefix: str) -> UnknownNameError:
        """The same error seen from outside: a field becomes a field of `prefix`."""
        kind = f"field of {prefix}" if self.kind == "field" else self.kind
        return UnknownNameError(kind, self.name, self.known, self.hint)


class PluginError(WorkbenchError):
    """A plugin that breaks the contract; the message names the plugin and what it must change."""


class PatchError(PluginError):
    """A plugin changed what all plugins share, such as a function or a setting of torch."""


class DiskError(WorkbenchError):
    """A file cannot be written: ends a study, whose trial in flight runs again on resume."""
