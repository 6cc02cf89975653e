# mypy: ignore-errors
"""The gradient of the gate after Mamba-1's scan as a Triton kernel.

The gate is a slice of the input projection, and its gradient is written where it belongs in the
projection's.
Needs triton; plain functions, no autograd, no wait for the device.
Legend for shapes: B batch, L length, C channels; R tokens and K channels of a program.
"""

import triton
import triton.language as tl
from torch import Tensor

from .triton_rows import row_stride
from .triton_selective_steps import sigmoid

TOKENS, CHANNELS = 4, 512  # of a program


def gate_backward(
    dout_BLC: Tensor,
    y_BLC: Tensor,
    z_BLC: Tensor,
    dz_BLC: Tensor,
    out_BLC: Tensor | None,
    dy_BLC: Tensor,
) -> Tensor:
    """Write the gradients of `y * silu(z)` and return y's.

    Args:
        dout_BLC, y_BLC: contiguous.
        z_BLC, dz_BLC: slices of longer rows.
        out_BLC: contiguous; if given, `y * silu(z)` is written there once more.
        dy_BLC: contiguous; may be `dout_BLC`.
    """
    channels = y_BLC.shape[-1]
    rows = y_BLC.numel() // channels
    block = min(CHANNELS, triton.next_power_of_2(channels))
    gate_backward_kernel[(triton.cdiv(rows, TOKENS), triton.cdiv(channels, block))](
        *(dout_BLC, y_BLC, z_BLC, dz_BLC, out_BLC, dy_BLC, rows, channels),
        *(row_stride(z_BLC), row_stride(dz_BLC), out_BLC is not None, TOKENS, block),
        num_warps=4 if block >= 256 else 1,
    )
    return dy_BLC


@triton.jit
def gate_backward_kernel(
    dout, y, z, dz, out, dy, rows, channels: tl.constexpr, Z_ROW: tl.constexpr,
    DZ_ROW: tl.constexpr, HAS_OUT: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row_R1 = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[:, None]
    c_1K = (tl.program_id(1) * K + tl.arange(0, K))[None, :]
    keep_RK = (row_R1 < rows) & (c_1K < channels)
    at_RK = row_R1 * channels + c_1K
    dout_RK = tl.load(dout + at_RK, mask=keep_RK, other=0.0).to(tl.float32)
    y_RK = tl.load(y + at_RK, mask=keep_RK, other=0.0).to(tl.float32)
    z_RK = tl.load(z + row_R1 * Z_ROW + c_1K, mask=keep_RK, other=0.0).to(tl.float32)
    sigmoid_RK = sigmoid(z_RK, False)
    gate_RK = z_RK * sigmoid_RK
    slope_RK = sigmoid_RK + gate_RK * (1.0 - sigmoid_RK)
    dz_RK = (dout_RK * y_RK * slope_RK).to(dz.dtype.element_ty)
    tl.store(dz + row_R1 * DZ_ROW + c_1K, dz_RK, mask=keep_RK)
    if HAS_OUT:
        tl.store(out + at_RK, (y_RK * gate_RK).to(out.dtype.element_ty), mask=keep_RK)
    tl.store(dy + at_RK, (dout_RK * gate_RK).to(dy.dtype.element_ty), mask=keep_RK)
