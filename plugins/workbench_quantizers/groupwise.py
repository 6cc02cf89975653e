"""int8 and int4 weights with one symmetric scale a group of neighbouring inputs.

    scale = max |W| / ((2^bits - 1) / 2)      one a group of `group_size` columns of a row
    W ≈ clip(round(W / scale), -2^(bits-1), 2^(bits-1) - 1) * scale

Scales have the weight's dtype and all arithmetic is in it, as in compressed-tensors' weight-only
W8A16 and W4A16 schemes: the values computed with equal its fake quantization exactly.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from workbench.config import Choice
from workbench.errors import FieldError
from workbench.layer import Layer
from workbench.quantizer import QuantizationReport, Quantizer
from workbench_quantizers.packing import pack, unpack
from workbench_quantizers.stored import StoredLinear, store_linears
from workbench_quantizers.ternary import PackedBitLinear, is_ternary


def fit_group_size(in_features: int, group_size: int) -> int:
    """The largest divisor of `in_features` that is at most `group_size`."""
    return max(size for size in range(1, group_size + 1) if in_features % size == 0)


def quantize_groups(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Integers and scales with `weight ≈ integers * scale`, group by group.

    Args:
        weight: `[out_features, in_features]`.
        group_size: a divisor of in_features.

    Returns:
        int8 `[out_features, in_features]` and scales `[out_features, in_features // group_size]`
        in the weight's dtype. A group with a value that is not finite gets a scale that is not:
        a diverged weight stays one.
    """
    groups = weight.reshape(weight.shape[0], -1, group_size)
    # A tensor on the device: CUDA divides by a Python number through its rounded reciprocal.
    half_range = torch.full((), (2**bits - 1) / 2, dtype=weight.dtype, device=weight.device)
    scale = groups.abs().amax(-1) / half_range
    scale = torch.where(scale == 0, torch.finfo(weight.dtype).eps, scale)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    integers = (groups / scale[..., None]).clamp(low, high).round()
    return integers.nan_to_num(nan=0.0).to(torch.int8).flatten(-2), scale


class GroupwiseLinear(StoredLinear):
    """A linear with integer weights: int8 as they are, int4 two a byte.

    Attributes:
        weight_packed: int8 `[out, in]`, or uint8 `[out, ceil(in / 2)]` for int4.
        weight_scale: `[out, in // group_size]` in the dtype of the linear's weight.
        group_size: of this linear; see `fit_group_size`.
    """

    def __init__(self, linear: nn.Linear, bits: int, group_size: int) -> None:
        super().__init__(linear, f"int{bits}")
        self.bits = bits
        self.group_size = fit_group_size(linear.in_features, group_size)
        integers, scale = quantize_groups(linear.weight.detach(), bits, self.group_size)
        self.register_buffer("weight_packed", integers if bits == 8 else pack(integers, bits))
        self.register_buffer("weight_scale", scale)

    @property
    def weight(self) -> Tensor:
        integers = self.weight_packed
        if self.bits != 8:
            integers = unpack(integers, self.bits, self.in_features)
        groups = integers.reshape(self.out_features, -1, self.group_size).to(
            self.weight_scale.dtype
        )
        return groups.mul_(self.weight_scale[..., None]).flatten(-2)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupwiseConfig:
    """How many neighbouring inputs share a scale.

    A linear whose in_features it does not divide uses the largest divisor below it; the replaced
    module's `group_size` says which.
    """

    group_size: Annotated[int, Choice(32, 64, 128), "Inputs that share a scale"] = 128

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise FieldError("group_size", f"must be at least 1, got {self.group_size}")


class Groupwise(Quantizer):
    """Weight-only, symmetric, group-wise integers; activations stay as they are.

    A linear that was trained with ternary weights (BitLinear) is packed as b1.58: fewer bytes, and
    nothing lost. Of the others only plain `nn.Linear` modules are replaced: a subclass computes
    something of its own.
    """

    Config: ClassVar[type] = GroupwiseConfig
    bits: ClassVar[int]

    @classmethod
    def quantize(cls, layer: Layer, config: Any) -> QuantizationReport:
        def convert(linear: nn.Linear) -> StoredLinear | str:
            if is_ternary(linear):
                return PackedBitLinear(linear)
            if type(linear) is not nn.Linear:
                return f"computes in its own way ({type(linear).__name__})"
            return GroupwiseLinear(linear, cls.bits, config.group_size)

        return store_linears(layer, (f"int{cls.bits}", "b1_58"), convert)


class Int8(Groupwise):
    """One byte a weight and a scale a group."""

    reference = "compressed-tensors W8A16, symmetric, group strategy"
    bits = 8


class Int4(Groupwise):
    """Half a byte a weight and a scale a group."""

    reference = "compressed-tensors W4A16, symmetric, group strategy"
    bits = 4
