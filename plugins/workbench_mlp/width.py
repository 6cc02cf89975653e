"""The inner width of an MLP, and its costs."""

from __future__ import annotations

import math
from typing import Protocol

from workbench.costs import Costs
from workbench.errors import FieldError

ROUNDING = 1e-6  # 8/3 of a multiple of 3 lies an ulp above or below a whole number


class MLPConfig(Protocol):
    """What the Configs of all MLPs have."""

    @property
    def intermediate_size(self) -> int | None: ...
    @property
    def expand(self) -> float: ...
    @property
    def multiple_of(self) -> int: ...
    @property
    def bias(self) -> bool: ...


def intermediate_size(d_model: int, config: MLPConfig) -> int:
    """The stated width, or `expand * d_model` rounded up to `multiple_of`."""
    if config.intermediate_size is not None:
        return config.intermediate_size
    units = config.expand * d_model / config.multiple_of
    return math.ceil(units - ROUNDING) * config.multiple_of


def check(d_model: int, config: MLPConfig) -> None:
    """Refuse a Config that gives no width.

    Raises:
        FieldError: names the field and what would work.
    """
    if config.intermediate_size is not None and config.intermediate_size < 1:
        raise FieldError(
            "intermediate_size", f"must be at least 1, or null, got {config.intermediate_size}"
        )
    if config.multiple_of < 1:
        raise FieldError("multiple_of", f"must be at least 1, got {config.multiple_of}")
    if not (config.expand > 0 and math.isfinite(config.expand)):
        raise FieldError("expand", f"must be a number above 0, got {config.expand}")


def costs(d_model: int, config: MLPConfig, *, num_inner: int, length: int) -> Costs:
    """Costs of `num_inner` projections up, which may have biases as the one down has."""
    width = intermediate_size(d_model, config)
    weights = (num_inner + 1) * d_model * width
    return Costs(
        parameters=weights + (num_inner * width + d_model) * config.bias,
        forward_flops=2 * weights * length,
        decode_flops=2 * weights,
    )
