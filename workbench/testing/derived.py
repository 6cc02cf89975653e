"""Configs that nobody wrote: the defaults, and the corners of the search ranges that are built."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from workbench import config as configs
from workbench.config import Field, Mixer, PerLayer
from workbench.errors import FieldError, WorkbenchError
from workbench.testing.configs import searched_values

TRIES = 200  # before a space counts as one in which nothing can be built
LAYERS = 4  # values of a field with one a layer
MIXERS = {"recurrent": "mamba", "attention": "attention"}  # offered to placements, by kind

Accept = Callable[[Any], bool]


class UnderivableError(FieldError):
    """Only the author can say what to test with: nothing is wrong with the thing itself."""


def derived_configs(config_class: type, accept: Accept) -> list[Any]:
    """A few configs that `accept` takes: the defaults, both corners, and one with flags set.

    A field without a default takes the first value of its search range. A corner moves one field
    after the other to the low (or high) end of its range and keeps what is accepted; the last
    config is the high corner with every bool flipped that no range is declared for, likewise.

    Raises:
        UnderivableError: a field has neither a default nor a search range.
        FieldError: no draw from the search ranges is accepted.
    """
    declared = configs.fields_of(config_class)
    ranges = {name: values for name, field in declared.items() if (values := _values(field))}
    start = _start(config_class, declared, ranges, accept)
    ends = [{name: values[end] for name, values in ranges.items()} for end in (0, -1)]
    flags = {
        name: not field.default
        for name, field in declared.items()
        if name not in ranges and isinstance(field.default, bool)
    }
    low, high = (_moved(config_class, start, end, accept) for end in ends)
    flagged = _moved(config_class, high, flags, accept)
    unique: list[Any] = []
    for made in (start, low, high, flagged):
        config: Any = configs.from_dict(config_class, made)
        if config not in unique:
            unique.append(config)
    return unique


def draws(config_class: type, count: int) -> Iterator[dict[str, Any]]:
    """Values of all searched fields, drawn together; the same ones every time."""
    declared = configs.fields_of(config_class)
    ranges = {name: values for name, field in declared.items() if (values := _values(field))}
    dice = random.Random(0)
    for _ in range(count if ranges else 1):
        yield {name: dice.choice(values) for name, values in ranges.items()}


def _values(field: Field) -> list[Any]:
    """What a search may draw for a field, ends first and last; empty if it is not searched."""
    match field.domain:
        case None:
            return []
        case PerLayer(inner):
            singles = _singles(inner)
            return [
                [singles[(index + shift) % len(singles)] for index in range(LAYERS)]
                for shift in range(len(singles))
            ]
        case domain:
            return _singles(domain)


def _singles(domain: Any) -> list[Any]:
    kinds = [domain.kind] if isinstance(domain, Mixer) and domain.kind else list(MIXERS)
    return list(searched_values(domain, [MIXERS[kind] for kind in kinds]))


def _start(
    config_class: type, declared: Mapping[str, Field], ranges: dict[str, list[Any]], accept: Accept
) -> dict[str, Any]:
    required: dict[str, Any] = {}
    for name, field in declared.items():
        if field.required:
            if name not in ranges:
                raise UnderivableError(name, "has neither a default nor a search range")
            # Two fields that name a mixer take two, where two are offered.
            required[name] = ranges[name][len(required) % len(ranges[name])]
    if _accepted(config_class, required, accept):
        return required
    for values in draws(config_class, TRIES):
        if _accepted(config_class, required | values, accept):
            return required | values
    names = ", ".join(ranges) or "none is searched"
    raise FieldError(names, f"none of {TRIES} draws from the search ranges can be built")


def _moved(
    config_class: type, start: dict[str, Any], goal: Mapping[str, Any], accept: Accept
) -> dict[str, Any]:
    """As near to the goal as one field after the other gets."""
    values = start
    for name, value in goal.items():
        moved = values | {name: value}
        if _accepted(config_class, moved, accept):
            values = moved
    return values


def _accepted(config_class: type, values: Mapping[str, Any], accept: Accept) -> bool:
    try:
        config: Any = configs.from_dict(config_class, values)
        return accept(config)
    except WorkbenchError:
        return False
    except Exception:
        return True  # a mistake in the thing itself: its suite fails on it, and says where
