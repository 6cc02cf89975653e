"""b1.58: the ternary weights of BitLinears, packed four a byte beside one float32 scale.

Ma et al., "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits", arXiv:2402.17764.
Nothing is lost: a BitLinear computes with ternaries anyway, this stores them and nothing else.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn import functional as F

from workbench.layer import Layer
from workbench.quantizer import QuantizationReport, Quantizer
from workbench_quantizers.packing import pack, unpack
from workbench_quantizers.stored import StoredLinear, store_linears

BITS = 2  # a ternary as stored: four a byte


@runtime_checkable
class Ternary(Protocol):
    """What a linear must offer to be packed; `isinstance` checks that the names are there.

    Attributes:
        weight_bits: 1.58.
        act_bits: bits of its inputs.
    """

    weight_bits: float
    act_bits: int

    def ternary(self) -> tuple[Tensor, Tensor]:
        """int8 of the weight's shape in {-1, 0, 1}, and a float32 scalar that multiplies it."""


def is_ternary(linear: nn.Linear) -> bool:
    """Whether a linear was trained with ternary weights and can say them."""
    return isinstance(linear, Ternary) and linear.weight_bits == 1.58


class PackedBitLinear(StoredLinear):
    """A BitLinear that holds its ternaries only; inputs are quantized a token, as in training.

    Attributes:
        weight_packed: uint8 `[out, ceil(in / 4)]`.
        weight_scale: float32, a scalar.
        act_bits: bits of the inputs.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, "b1_58")
        assert isinstance(linear, Ternary)
        self.act_bits = linear.act_bits
        values, scale = linear.ternary()
        self.register_buffer("weight_packed", pack(values, BITS))
        self.register_buffer("weight_scale", scale)

    @property
    def weight(self) -> Tensor:
        """The ternaries times their scale, float32 `[out, in]`."""
        return unpack(self.weight_packed, BITS, self.in_features).float() * self.weight_scale

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`, in the dtype of `x`."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(self._quantize_inputs(x), self.weight.to(x.dtype), bias)

    def _quantize_inputs(self, x: Tensor) -> Tensor:
        """Symmetric integers with one scale a token, as floats in the dtype of `x`."""
        top = 2 ** (self.act_bits - 1) - 1
        values = x.float()
        inverse = top / values.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        integers: Tensor = (values * inverse).round().clamp(-top - 1, top)
        return integers.mul(1 / inverse).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act_bits={self.act_bits}"


class B158(Quantizer):
    """Packs BitLinears; every other linear stays, for it was not trained to be ternary."""

    reference = "arXiv:2402.17764"

    @classmethod
    def quantize(cls, layer: Layer, config: object) -> QuantizationReport:
        def convert(linear: nn.Linear) -> StoredLinear | str:
            if is_ternary(linear):
                return PackedBitLinear(linear)
            return "not trained with ternary weights: b1_58 packs BitLinears only"

        return store_linears(layer, ("b1_58",), convert)
