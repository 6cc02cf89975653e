"""What the Mamba layers share: the initial step sizes, fp32 maths, and checks of their Configs.

Both generations draw their initial step sizes alike (Gu and Dao, arXiv:2312.00752, section 3.6).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import FieldError

# The widths that the convolution kernels are written for (causal-conv1d).
CONV_WIDTHS = (2, 3, 4)


# A decay of 0.999 a token would round to 1 in bfloat16, so recurrences run in float32.
STATE_BYTES = 4


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype that recurrences run in and keep their state in: float64 stays float64."""
    return torch.promote_types(dtype, torch.float32)


def upcast(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that recurrences run in."""
    return tensor.to(at_least_float32(tensor.dtype))


@torch.no_grad()
def init_dt_bias(bias: Tensor, config: Any) -> None:
    """Fill `bias` in place so that softplus(bias) is log-uniform in [dt_min, dt_max].

    Args:
        config: has `dt_min`, `dt_max` and `dt_init_floor` (no step starts below it).
    """
    low, high = math.log(config.dt_min), math.log(config.dt_max)
    dt = torch.empty_like(bias, dtype=torch.float32).uniform_(low, high).exp_()
    dt.clamp_(min=config.dt_init_floor)
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


def is_plain(linear: nn.Module) -> bool:
    """Whether a linear is its product alone: not quantized, adapted, biased or watched by hooks."""
    if type(linear) is not nn.Linear or dict(linear.named_parameters()).keys() != {"weight"}:
        return False
    hooks = linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks
    return type(linear.weight) is nn.Parameter and not any(len(kind) for kind in hooks)


def require_at_least_one(config: Any, *names: str) -> None:
    """Raise FieldError for the first of these fields that is set and below 1."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise FieldError(name, f"must be at least 1, got {value}")


def check_shared(config: Any) -> None:
    """Refuse what no Mamba can be built with: convolution width, norm epsilon, step sizes.

    Raises:
        FieldError: names the field and values that work.
    """
    if config.d_conv not in CONV_WIDTHS:
        widths = ", ".join(map(str, CONV_WIDTHS))
        raise FieldError(
            "d_conv", f"the convolution kernels take a width of {widths}, got {config.d_conv}"
        )
    for name in ("norm_eps", "dt_min", "dt_init_floor"):
        if getattr(config, name) <= 0:
            raise FieldError(name, f"must be above 0, got {getattr(config, name)}")
    if config.dt_max < config.dt_min:
        raise FieldError(
            "dt_max", f"must be at least dt_min = {config.dt_min}, got {config.dt_max}"
        )


def divisors(number: int) -> list[int]:
    """All divisors in ascending order."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def nearest(values: list[int], wanted: int) -> int:
    """The value closest to the one wanted, in ratio, the larger of two equally close."""
    return min(reversed(values), key=lambda value: abs(math.log(value / wanted)))
