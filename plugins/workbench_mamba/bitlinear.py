"""BitLinear of BitNet b1.58: ternary weights, 8-bit activations, trained straight through.

Ma et al., "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits", arXiv:2402.17764.

    weight ≈ clip(round(W / s), -1, 1) * s            s = mean |W|, one a matrix
    input  ≈ clip(round(x / s_x), -128, 127) * s_x    s_x = max |x| / 127, one a token

The norm that b1.58 puts immediately before each quantization is the caller's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCALE_FLOOR = 1e-5  # of mean |W| and of max |x|: all-zero rows divide by no zero


def ternarize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Ternary values and their scale: `weight ≈ ternary * scale`.

    Args:
        weight: any shape, any floating dtype; the arithmetic is in float32.

    Returns:
        int8 of the same shape with values in {-1, 0, 1}, and the scale, a float32 scalar tensor.
    """
    levels, scale = _ternary_levels(weight)
    return levels.to(torch.int8), scale


def _ternary_levels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`ternarize` with the ternaries still in float32."""
    weight = weight.detach().float()
    scale = weight.abs().mean().clamp_(min=SCALE_FLOOR)
    return (weight * (1 / scale)).round_().clamp_(-1, 1), scale


def quantize_activations(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Symmetric integers a token and their scales: `x ≈ values * scale`.

    Args:
        x: `[..., features]`, any floating dtype; the arithmetic is in float32.
        bits: 2 to 8.

    Returns:
        int8 `[..., features]` and float32 scales `[..., 1]`.
    """
    levels, scale = _activation_levels(x, bits)
    return levels.to(torch.int8), scale


def _activation_levels(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`quantize_activations` with the integers still in float32."""
    x = x.detach().float()
    top = 2 ** (bits - 1) - 1
    inverse = top / x.abs().amax(-1, keepdim=True).clamp_(min=SCALE_FLOOR)
    return (x * inverse).round_().clamp_(-top - 1, top), 1 / inverse


class _StraightThrough(torch.autograd.Function):
    """`original + (quantized - original).detach()`, without the rounding of that sum."""

    @staticmethod
    def forward(ctx: Any, original: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _straight_through(original: Tensor, quantized: Tensor) -> Tensor:
    result: Tensor = _StraightThrough.apply(original, quantized)  # type: ignore[no-untyped-call]
    return result


class BitLinear(nn.Linear):
    """A linear whose weights and inputs are quantized in every forward pass.

    The weights themselves stay in full precision (training moves them), and so do the bytes that
    they take: only a quantizer that packs the ternaries makes them small.

    Args:
        act_bits: bits of the activations, 2 to 8.

    Attributes:
        weight_bits: 1.58, by which quantizers know a linear that was trained to be ternary.
    """

    weight_bits = 1.58

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        act_bits: int = 8,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.act_bits = act_bits

    def ternary(self) -> tuple[Tensor, Tensor]:
        """The weights as they are computed with, see `ternarize`: what a quantizer stores."""
        return ternarize(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`, in the dtype of `x`."""
        ternary, scale = _ternary_levels(self.weight)
        levels, scales = _activation_levels(x, self.act_bits)
        weight = _straight_through(self.weight, ternary.mul_(scale).to(x.dtype))
        inputs = _straight_through(x, levels.mul_(scales).to(x.dtype))
        return F.linear(inputs, weight, None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act_bits={self.act_bits}"
