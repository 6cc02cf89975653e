"""Typed configurations: frozen dataclasses whose annotations carry each field's search range.

A Config is declared once and read four ways: the search space draws from its ranges, JSON and TOML
are validated against its types, the dashboard shows its labels, and records keep its values.

    @dataclass(frozen=True, kw_only=True)
    class Config:
        d_state: Annotated[int, Choice(16, 32, 64), "SSM state size N"] = 16
        dropout: Annotated[float, Range(0.0, 0.3)] = 0.0

Neither torch nor Optuna is imported here: exported models carry this module with them.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)
from weakref import WeakKeyDictionary

from workbench.errors import FieldError, UnknownNameError

T = TypeVar("T")
Scalar = bool | int | float | str | None


@dataclasses.dataclass(frozen=True)
class Range:
    """An interval to search, both ends included.

    Args:
        low, high: the ends; two ints make an integer range.
        step: distance of neighbouring values (not together with `log`).
        log: draw uniformly in the logarithm.
    """

    low: float
    high: float
    step: float | None = None
    log: bool = False

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise FieldError("low", f"{self.low} is above high = {self.high}")
        if self.step is not None and self.step <= 0:
            raise FieldError("step", f"{self.step} must be above 0")
        if self.log and (self.low <= 0 or self.step is not None):
            raise FieldError("log", "needs low > 0 and no step")


@dataclasses.dataclass(frozen=True, init=False)
class Choice:
    """A finite set of values to search: scalars, drawn as one categorical."""

    values: tuple[Scalar, ...]

    def __init__(self, *values: Scalar) -> None:
        if not values:
            raise FieldError("values", "a Choice needs at least one value")
        if len(set(map(repr, values))) != len(values):
            raise FieldError("values", f"a Choice names each value once, not {list(values)}")
        object.__setattr__(self, "values", values)


@dataclasses.dataclass(frozen=True)
class Mixer:
    """The name of one of the mixers that the study offers (fields of placement policies).

    Args:
        kind: only mixers of this kind (`"attention"`: state grows with the context;
            `"recurrent"`: bounded state); None offers all.
    """

    kind: Literal["attention", "recurrent"] | None = None


@dataclasses.dataclass(frozen=True)
class PerLayer:
    """A tuple with one value a layer, each drawn from `inner` on its own."""

    inner: Range | Choice | Mixer


Domain = Range | Choice | Mixer | PerLayer
DOMAINS = (Range, Choice, Mixer, PerLayer)


@dataclasses.dataclass(frozen=True)
class Field:
    """What is declared of one Config field.

    Attributes:
        name: the field's name.
        type: its type without the annotations.
        domain: its search range, or None: a study must then fix it or leave the default.
        label: one line for people, "" if none was given.
        default: its default, or `dataclasses.MISSING`.
    """

    MISSING: ClassVar[Any] = dataclasses.MISSING

    name: str
    type: Any
    domain: Domain | None
    label: str
    default: Any

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoConfig:
    """The Config of a thing that has nothing to set."""


def fields_of(config_class: type) -> dict[str, Field]:
    """The declared fields of a Config class, by name, in order.

    Raises:
        TypeError: it is no frozen dataclass.
    """
    check_config_class(config_class)
    if config_class not in _declared:
        _declared[config_class] = _read_fields(config_class)
    return dict(_declared[config_class])


# Weak, because a plugin that is loaded anew leaves its old classes behind.
_declared: WeakKeyDictionary[type, dict[str, Field]] = WeakKeyDictionary()


def _read_fields(config_class: Any) -> dict[str, Field]:
    hints = get_type_hints(config_class, include_extras=True)
    result = {}
    for item in dataclasses.fields(config_class):
        annotation = hints[item.name]
        extras: tuple[Any, ...] = ()
        if get_origin(annotation) is Annotated:
            annotation, *rest = get_args(annotation)
            extras = tuple(rest)
        default = item.default
        if default is dataclasses.MISSING and item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        result[item.name] = Field(
            name=item.name,
            type=annotation,
            domain=next((extra for extra in extras if isinstance(extra, DOMAINS)), None),
            label=next((extra for extra in extras if isinstance(extra, str)), ""),
            default=default,
        )
    return result


def check_config_class(config_class: Any) -> None:
    """Raise TypeError unless `config_class` is a frozen dataclass."""
    if not (isinstance(config_class, type) and dataclasses.is_dataclass(config_class)):
        raise TypeError(f"Config must be a dataclass, not {config_class!r}")
    if not config_class.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise TypeError(f"{config_class.__qualname__} must be frozen: @dataclass(frozen=True)")


def from_dict(config_class: type[T], data: Mapping[str, Any]) -> T:
    """A Config from plain data, every value checked against its declared type.

    Raises:
        UnknownNameError: a field that the Config does not have.
        FieldError: a missing field, a wrong type, or a value that the Config itself refuses.
    """
    declared = fields_of(config_class)
    for name in data:
        if name not in declared:
            raise UnknownNameError("field", name, declared)
    values = {}
    for name, field in declared.items():
        if name in data:
            values[name] = coerce(data[name], field.type, name)
        elif field.required:
            raise FieldError(name, "is required")
    return config_class(**values)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON data of a Config: every field, tuples as lists."""
    return {
        item.name: _plain(getattr(config, item.name)) for item in dataclasses.fields(type(config))
    }


def coerce(value: Any, expected: Any, name: str) -> Any:
    """`value` as the type `expected`: ints widen to float, lists become tuples, nothing else.

    Raises:
        FieldError: the value has another type.
    """
    origin = get_origin(expected)
    if origin in (Union, types.UnionType):
        return _coerce_union(value, get_args(expected), name)
    if origin is Literal:
        # By type, too: True == 1 and 1 == 1.0, but they are not the same in JSON.
        if not any(type(value) is type(item) and value == item for item in get_args(expected)):
            raise FieldError(name, f"{value!r} is none of {list(get_args(expected))}")
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return _coerce_tuple(value, get_args(expected), name)
    if expected is float and type(value) in (int, float):
        return _coerce_float(value, name)
    if isinstance(expected, type) and type(value) is expected:
        return value
    if expected is type(None) and value is None:
        return None
    raise FieldError(name, f"expected {_type_name(expected)}, got {value!r}")


def _coerce_float(value: float, name: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise FieldError(name, f"must be a finite number, got {value!r:.20}")
    return number


def _coerce_tuple(value: Any, inner: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    if inner[-1:] == (Ellipsis,):
        inner = inner[:1] * len(value)
    if len(value) != len(inner):
        raise FieldError(name, f"expected {len(inner)} values, got {len(value)}")
    pairs = enumerate(zip(value, inner, strict=True))
    return tuple(coerce(item, expected, f"{name}[{i}]") for i, (item, expected) in pairs)


def _coerce_union(value: Any, options: tuple[Any, ...], name: str) -> Any:
    # An exact type goes before a widening one: 3 in `float | int` stays an int.
    for option in sorted(options, key=lambda option: option is not type(value)):
        try:
            return coerce(value, option, name)
        except FieldError:
            continue
    raise FieldError(name, f"expected {' or '.join(map(_type_name, options))}, got {value!r}")


def _type_name(expected: Any) -> str:
    if expected is type(None):
        return "null"
    return expected.__name__ if isinstance(expected, type) else str(expected)


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
