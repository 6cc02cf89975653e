"""Why suggestions came to nothing before any training: counted by what refused them."""

from __future__ import annotations

import re
from collections import Counter

from workbench.errors import FieldError
from workbench.ledger import UNBUILDABLE
from workbench.records import Trial
from workbench.space import SpaceConfig

IN_BLOCK = re.compile(r"blocks\[\d+\] \(([^)]+)\)")


def cause_of(trial: Trial) -> str:
    """What refused an infeasible trial, whatever the values and the block.

    `constraints.parameters` for a violated bound, else the field that does not fit, such as
    `attention.head_dim`.
    """
    violated = [name for name, excess in _violations(trial).items() if excess > 0]
    if violated:
        return ", ".join(f"constraints.{name}" for name in violated)
    return _field_of(trial.reason)


def _field_of(reason: str) -> str:
    return IN_BLOCK.sub(r"\1", reason.partition(": ")[0])


class Refusals:
    """Suggestions that came to nothing, by cause, each cause with its nearest miss."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._nearest: dict[str, tuple[float, str]] = {}

    def add(self, trial: Trial) -> None:
        """Count an infeasible trial."""
        miss = sum(max(0.0, excess) for excess in _violations(trial).values())
        self._count(cause_of(trial), miss, trial.reason)

    def add_error(self, error: FieldError) -> None:
        """Count a suggestion whose values do not fit together, of which there is no trial."""
        self._count(_field_of(str(error)), 0.0, str(error))

    def _count(self, cause: str, miss: float, reason: str) -> None:
        self.counts[cause] += 1
        if cause not in self._nearest or miss < self._nearest[cause][0]:
            self._nearest[cause] = (miss, reason)

    def lines(self, space: SpaceConfig) -> list[str]:
        """A line a cause, the commonest first: how often, where to change it, the nearest miss."""
        return [
            f"  {count:>3} × {_place(cause, space)}, such as: {self._nearest[cause][1]}"
            for cause, count in self.counts.most_common()
        ]


def _violations(trial: Trial) -> dict[str, float]:
    found = trial.data.get("constraints", {})
    return {name: excess for name, excess in found.items() if name != UNBUILDABLE}


def _place(cause: str, space: SpaceConfig) -> str:
    """Where in a study's file the cause is to be changed."""
    owner, _, field = cause.partition(".")
    if cause.startswith("constraints."):
        return f"[constraints] {cause.replace('constraints.', '')}"
    if field.startswith("quantizer."):
        return f"[space.quantizer] {field.removeprefix('quantizer.')}"
    if field == "layer":  # not what it is set to, but that it lies where it does
        return f"[space] {'mlps' if owner in space.mlps else 'mixers and placements'} ({owner})"
    if owner in (*space.mixers, *space.mlps):
        return f"[space.layers.{owner}] {field}"
    if owner in space.placements:
        return f"[space.placement.{owner}] {field}".rstrip()
    return f"[space] {cause}"
