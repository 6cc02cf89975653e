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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Sizes):
    """Which generations are timed."""

    batch_size: Annotated[int, "Sequences that are generated together"] = 1
    context: Annotated[int, "Tokens of each prompt"] = 512
    tokens: Annotated[int, "Tokens generated after it, at least 2"] = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 2:
            raise FieldError("tokens", f"must be at least 2, got {self.tokens}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peak(Sizes):
    """At which moment memory is looked at."""

    phase: Annotated[
        Literal["prefill", "decode", "training"], "What is run; training on unquantized weights"
    ] = "decode"
    batch_size: Annotated[int, "Sequences together"] = 1
    context: Annotated[int, "Tokens of each sequence"] = 512


AUTO = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predicted(Sizes):
    """Which latency table is asked."""

    batch_size: Annotated[int, "Sequences together"] = 1
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], "Of weights, activations and caches"
    ] = "float32"
    steps: Annotated[
        Literal["auto", "eager", "cuda-graph"], "How steps run; auto: a graph on a CUDA device"
    ] = "auto"
    threads: Annotated[int | None, "CPU threads of the table; torch's now if None"] = None
    table: Annotated[str, "Its file; auto finds this machine's in the study's cache"] = AUTO


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictedDecode(Predicted):
    """Which decode step is predicted."""

    context: Annotated[int, "Tokens before the step"] = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictedPrefill(Predicted):
    """Which prefill is predicted."""

    length: Annotated[int, "Tokens of a prompt"] = 512
