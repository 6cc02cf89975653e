"""8-bit floating-point weights: E4M3 with one scale an output channel or a square block.

    scale = max |W| / 448                 448 is the largest E4M3 number
    W ≈ e4m3(W / scale) * scale           rounded to the nearest, ties to even

E4M3 is the format without infinities of Micikevicius et al. 2022, arXiv:2209.05433. Scales have the
weight's dtype and all arithmetic is in it, as in compressed-tensors' float-quantized format; blocks
of 128 are those of DeepSeek-V3, arXiv:2412.19437. Activations stay as they are.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.config import Choice
from workbench.errors import FieldError
from workbench.hookspecs import Register, hookimpl
from workbench.layer import Layer
from workbench.quantizer import QuantizationReport, Quantizer
from workbench_quantizers.stored import StoredLinear, store_linears
from workbench_quantizers.ternary import PackedBitLinear, is_ternary

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0


def spread(scale: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """Each weight's scale, `[out_features, in_features]`, from one a block."""
    rows = scale.repeat_interleave(block[0], dim=0)[: shape[0]]
    return rows.repeat_interleave(block[1], dim=1)[:, : shape[1]]


def quantize_blocks(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """E4M3 numbers and scales with `weight ≈ numbers * scales`, block by block.

    Args:
        weight: `[out_features, in_features]`.
        block: rows and columns that share a scale; the last block of either may be cut short.

    Returns:
        float8_e4m3fn of the weight's shape and, in its dtype, one scale a block. A block with a
        value that is not finite comes back with NaN in it: a diverged weight stays one.
    """
    rows, columns = weight.shape
    padded = F.pad(weight, (0, -columns % block[1], 0, -rows % block[0]))
    tiles = padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))  # type: ignore[no-untyped-call]
    # A tensor on the device: CUDA divides by a Python number through its rounded reciprocal.
    largest = torch.full((), LARGEST, dtype=weight.dtype, device=weight.device)
    scale = tiles.abs().amax((1, 3)) / largest
    scale = torch.where(scale == 0, torch.finfo(weight.dtype).eps, scale)
    # A cast does not saturate: what rounds to more than the largest number would become NaN.
    numbers = (weight / spread(scale, block, weight.shape)).clamp(-LARGEST, LARGEST).to(E4M3)
    return numbers, scale


class Fp8Linear(StoredLinear):
    """A linear that holds E4M3 weights and widens them in every call.

    Attributes:
        weight_packed: uint8 `[out, in]`, the numbers' bits: `.to(dtype)` of the whole model, which
            converts every floating-point buffer, must leave them as they are.
        weight_scale: one a block, in the dtype of the linear's weight.
        block: rows and columns that share a scale.
    """

    def __init__(self, linear: nn.Linear, block_size: int | None) -> None:
        super().__init__(linear, "fp8")
        self.block = (1, linear.in_features) if block_size is None else (block_size, block_size)
        numbers, scale = quantize_blocks(linear.weight.detach(), self.block)
        self.register_buffer("weight_packed", numbers.view(torch.uint8))
        self.register_buffer("weight_scale", scale)

    @property
    def weight(self) -> Tensor:
        scale = spread(self.weight_scale, self.block, self.weight_packed.shape)
        return self.weight_packed.view(E4M3).to(scale.dtype) * scale

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block={self.block}"


class Fp8(Quantizer):
    """One byte a weight, with a relative error of at most 1/16 for all but the smallest.

    A linear that was trained with ternary weights (BitLinear) is packed as b1.58: fewer bytes, and
    nothing lost. Of the others only plain `nn.Linear` modules are replaced: a subclass computes
    something of its own.
    """

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        block_size: Annotated[
            int | None, Choice(None, 128), "Side of a square that shares a scale; null: a row"
        ] = None

        def __post_init__(self) -> None:
            if self.block_size is not None and self.block_size < 1:
                raise FieldError("block_size", f"must be at least 1, got {self.block_size}")

    reference: ClassVar[str] = "E4M3, arXiv:2209.05433; compressed-tensors float-quantized"

    @classmethod
    def quantize(cls, layer: Layer, config: Any) -> QuantizationReport:
        def convert(linear: nn.Linear) -> StoredLinear | str:
            if is_ternary(linear):
                return PackedBitLinear(linear)
            if type(linear) is not nn.Linear:
                return f"computes in its own way ({type(linear).__name__})"
            return Fp8Linear(linear, config.block_size)

        return store_linears(layer, ("fp8", "b1_58"), convert)


@hookimpl
def register_quantizers(register: Register[type[Quantizer]]) -> None:
    register("fp8", Fp8)
