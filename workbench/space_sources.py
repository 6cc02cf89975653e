"""Where a field gets its value from: fixed, or drawn from a choice or a range. No torch, no Optuna.

Anything with Optuna's `suggest_*` methods draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from workbench import config as configs
from workbench.config import Choice, Domain, PerLayer, Range
from workbench.errors import FieldError

SEARCH = "search"

Fixed = tuple[Any]  # a one-tuple: a value that is not searched
Source = Domain | Fixed


class Suggester(Protocol):
    """The part of `optuna.Trial` that a space needs."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int: ...
    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None, log: bool
    ) -> float: ...


def read_source(value: Any, expected: Any, declared: Domain | None, where: str) -> Source:
    """What a TOML value says of a field: a fixed value, a choice, a range, or the declared one."""
    if value == SEARCH and (declared is not None or expected is not str):
        if declared is None:
            raise FieldError(
                where,
                'declares no search range: give a list or {low = …, high = …} in place of "search"',
            )
        return declared
    if isinstance(value, Mapping):
        return _range(value, expected, where)
    if isinstance(value, list | tuple):
        try:
            # A field that holds a tuple takes a list as its value, not as choices.
            return (configs.coerce(value, expected, where),)
        except FieldError:
            return Choice(*(configs.coerce(item, expected, where) for item in value))
    return (configs.coerce(value, expected, where),)


def _range(table: Mapping[str, Any], expected: Any, where: str) -> Range:
    if not {"low", "high"} <= table.keys() <= {"low", "high", "step", "log"}:
        raise FieldError(where, f"a range has low, high and perhaps step or log, got {dict(table)}")
    types = {"low": expected, "high": expected, "step": expected, "log": bool}
    try:
        return Range(
            **{end: configs.coerce(value, types[end], end) for end, value in table.items()}
        )
    except FieldError as error:
        raise error.within(where) from None


def refuse_below_one(where: str, source: Source) -> None:
    """Raise FieldError, naming the study's field `where`, unless every value is 1 or more."""
    values: Any = source.values if isinstance(source, Choice) else source
    lowest = source.low if isinstance(source, Range) else min(values)
    if lowest < 1:
        raise FieldError(where, f"must be at least 1, got {lowest}")


def choose(trial: Suggester, name: str, choices: tuple[str, ...]) -> str:
    """One of the choices; a single one is not asked for."""
    return str(draw(trial, name, Choice(*choices)))


def draw(trial: Suggester, name: str, source: Any) -> Any:
    """A value of the parameter `name`; what has only one value is not asked for."""
    if isinstance(source, tuple):
        return source[0]
    if isinstance(source, Choice):
        if len(source.values) == 1:
            return source.values[0]
        return trial.suggest_categorical(name, list(source.values))
    low, high, step = source.low, source.high, source.step
    if isinstance(low, int) and isinstance(high, int) and (step is None or isinstance(step, int)):
        return trial.suggest_int(name, low, high, step=step or 1, log=source.log)
    return trial.suggest_float(name, low, high, step=step, log=source.log)


def draw_config(
    trial: Suggester,
    sources: Mapping[str, Source],
    named: Callable[[str], str],
    num_layers: int = 0,
) -> dict[str, Any]:
    """Values of a Config's fields.

    Args:
        sources: by field.
        named: the parameter of a field.
        num_layers: values of a field that has one a layer.
    """
    values = {}
    for field, source in sources.items():
        if isinstance(source, PerLayer):
            values[field] = [
                draw(trial, f"{named(field)}.{index}", source.inner) for index in range(num_layers)
            ]
        else:
            values[field] = draw(trial, named(field), source)
    return values


def to_data(source: Source) -> Any:
    """JSON data of a source: what a space's fingerprint is made of."""
    if isinstance(source, tuple):
        return source[0]
    if isinstance(source, Choice):
        return list(source.values)
    if isinstance(source, PerLayer):
        return {"per_layer": to_data(source.inner)}
    return dataclasses.asdict(source)
