"""Exact costs of layers and layouts: parameters, FLOPs, bytes. No torch, no measuring.

FLOPs count a multiply-add as two. Formulas follow the table in docs/costs.md; tests hold them
against built modules and torch's FlopCounterMode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """What one layer costs for one sequence, given a context length.

    Attributes:
        parameters: every trainable number of the layer.
        active_parameters: those that one token uses (fewer in a mixture of experts).
        own_parameters: those that a block keeps for itself where it takes the rest from another
            (`Layer.shared`); all of them where nothing can be shared.
        forward_flops: a full forward over `length` tokens.
        decode_flops: one decode step with `length` tokens of context before it.
        state_bytes: what the layer keeps between tokens after `length` tokens.
        decode_state_bytes: state read and written by that decode step.
    """

    parameters: int = 0
    active_parameters: int | None = None
    own_parameters: int | None = None
    forward_flops: int = 0
    decode_flops: int = 0
    state_bytes: int = 0
    decode_state_bytes: int = 0

    def __post_init__(self) -> None:
        for name in ("active_parameters", "own_parameters"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.parameters)

    def __add__(self, other: Costs) -> Costs:
        return Costs.sum((self, other))

    @classmethod
    def sum(cls, parts: Sequence[Costs]) -> Costs:
        """All of the parts together."""
        values = [vars(part) for part in parts]
        return cls(**{name: sum([value[name] for value in values]) for name in FIELDS})


FIELDS = tuple(field.name for field in dataclasses.fields(Costs))
