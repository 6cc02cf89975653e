"""Suggests a known layout again, in a space that may have grown since."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from workbench.errors import WorkbenchError
from workbench.layout import Layout
from workbench.space import Space

MOST_TRIES = 2000  # values tried for the parameters that a layout was not suggested with


class _LackingError(Exception):
    """A parameter of the new space that nothing gives a value to."""

    def __init__(self, name: str, distribution: BaseDistribution) -> None:
        super().__init__(name)
        self.name = name
        self.distribution = distribution


@dataclasses.dataclass
class Replay:
    """Answers a space's questions with known values, and remembers what it was asked.

    Attributes:
        given: values by parameter.
        params, distributions: of the parameters that the space asked for.
    """

    given: Mapping[str, Any]
    params: dict[str, Any] = dataclasses.field(default_factory=dict)
    distributions: dict[str, BaseDistribution] = dataclasses.field(default_factory=dict)

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._answer(name, CategoricalDistribution(tuple(choices)))

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        return int(self._answer(name, IntDistribution(low, high, log=log, step=step)))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        return float(self._answer(name, FloatDistribution(low, high, log=log, step=step)))

    def _answer(self, name: str, distribution: BaseDistribution) -> Any:
        if name not in self.given:
            raise _LackingError(name, distribution)
        value = self.given[name]
        if not _holds(distribution, value):
            raise WorkbenchError(f"{name} = {value!r} is not in the new space")
        self.params[name] = value
        self.distributions[name] = distribution
        return value


def replayed(
    space: Space, layout: Layout, params: Mapping[str, Any], known: dict[str, Any]
) -> tuple[Replay | None, str]:
    """The suggestion of `space` that makes `layout`, out of the parameters of another space.

    A parameter that the other space had fixed gets the value that makes the same layout. One of a
    single block, where the other space chose for all alike, gets what the layout says of the block.

    Args:
        known: values of such parameters, found with earlier layouts; what is found is added.

    Returns:
        The suggestion and "", or None and why there is none.
    """
    reason = "another layout in the new space"
    tries = 0
    read = itertools.islice(space.read(layout), MOST_TRIES)
    waiting = [{**blocks, **params} for blocks in read][::-1]
    while waiting and tries < MOST_TRIES:
        tries += 1
        replay = Replay(waiting.pop())
        try:
            made = space.suggest(replay)
        except _LackingError as lacking:
            values = _values(lacking.distribution)
            first = known.get(lacking.name)
            ordered = sorted(values, key=lambda value: value == first)  # the last is tried first
            waiting += [{**replay.given, lacking.name: value} for value in ordered]
        except WorkbenchError as error:
            reason = str(error) if tries == 1 else reason
        else:
            if made.hash == layout.hash:
                known.update({name: replay.params[name] for name in replay.params.keys() - params})
                return replay, ""
    return None, reason


def _values(distribution: BaseDistribution) -> list[Any]:
    """All values, where they can be counted."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    assert isinstance(distribution, FloatDistribution)
    return list(_steps(distribution))


def _steps(distribution: FloatDistribution) -> Iterator[float]:
    if distribution.step is not None:
        count = round((distribution.high - distribution.low) / distribution.step)
        for index in range(count + 1):
            yield distribution.low + index * distribution.step


def _holds(distribution: BaseDistribution, value: Any) -> bool:
    try:
        return bool(distribution._contains(distribution.to_internal_repr(value)))
    except (ValueError, TypeError):
        return False
