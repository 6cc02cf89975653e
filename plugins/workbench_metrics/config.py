"""What the built-in metrics can be told under `[metrics.NAME]` of a study."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from workbench.costs import DTYPE_BYTES
from workbench.errors import FieldError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Base of the Configs below: every whole number in them is a size, at least 1."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                raise FieldError(field.name, f"must be at least 1, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored(Sizes):
    """How what no quantizer stores is stored: weights, activations, caches."""

    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], "Of weights and caches not quantized"
    ] = "float32"

    @property
    def bytes_per_element(self) -> int:
        return DTYPE_BYTES[self.dtype]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredState(Stored):
    """How many sequences are held, and how far they have come."""

    batch_size: Annotated[int, "Sequences held at once"] = 1
    context: Annotated[int, "Tokens of each sequence so far"] = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forward(Sizes):
    """Of a forward pass over one sequence."""

    length: Annotated[int, "Tokens of the sequence"] = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(Sizes):
    """Of one decode step of one sequence."""

    context: Annotated[int, "Tokens before the step"] = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode(Sizes):
    """Which decode steps are timed."""

    batch_size: Annotated[int, "Sequences that step together"] = 1
    context: Annotated[int, "Tokens of the prompt before the first timed step"] = 512
    tokens: Annotated[int, "Steps timed before the prompt's states are restored"] = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Throughput(Decode):
    """Which decode steps are timed, several sequences together."""

    batch_size: Annotated[int, "Sequences that step together"] = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefill(Sizes):
    """Which prompts are timed."""

    batch_size: Annotated[int, "Prompts taken in together"] = 1
    length: Annotated[int, "Tokens of a prompt"] = 512
