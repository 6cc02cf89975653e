"""What the policies share: a majority and a minority mixer, and the checks of their names."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Annotated

from workbench.config import Mixer
from workbench.errors import FieldError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoMixers:
    """Fields of every policy that puts a few layers of one mixer among many of another."""

    majority: Annotated[str, Mixer("recurrent"), "mixer of all other layers"]
    minority: Annotated[str, Mixer("attention"), "mixer of the layers that are placed"]


def offered(field: str, name: str, mixers: Sequence[str]) -> str:
    """`name`, if the study offers it.

    Raises:
        FieldError: it does not; names the field and what is offered.
    """
    if name not in mixers:
        raise FieldError(field, f"{name!r} is not offered: the mixers are {', '.join(mixers)}")
    return name


def put(
    num_layers: int, mixers: Sequence[str], config: TwoMixers, indices: Collection[int]
) -> tuple[str, ...]:
    """The minority mixer at `indices`, the majority mixer elsewhere."""
    majority = offered("majority", config.majority, mixers)
    minority = offered("minority", config.minority, mixers)
    return tuple(minority if index in indices else majority for index in range(num_layers))


def spread(count: int, start: int, stop: int) -> list[int]:
    """`count` indices evenly spaced in `range(start, stop)`: the middles of equal parts.

    Neighbouring gaps differ by at most one. `count` must not exceed the range.
    """
    width = stop - start
    return [start + (2 * part + 1) * width // (2 * count) for part in range(count)]


def layers(count: int) -> str:
    """`1 layer`, `2 layers`, …: for messages."""
    return f"{count} layer" if count == 1 else f"{count} layers"


def at_least(field: str, value: int, low: int) -> None:
    """Raise FieldError for a field below the least value that makes sense."""
    if value < low:
        raise FieldError(field, f"must be at least {low}, got {value}")
