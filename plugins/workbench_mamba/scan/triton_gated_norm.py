# mypy: ignore-errors
"""Mamba-2's gated RMSNorm as Triton kernels, forward and backward.

The gate is a slice of the input projection, and its gradient is written where it belongs in the
projection's.
Needs triton; plain functions, no autograd, no wait for the device.
Legend for shapes: B batch, L length, I inner channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.triton_launch import let_next_start, may_overlap, wait_for_previous
from workbench_mamba.scan.triton_rows import row_stride

ROW_PROGRAMS = 264  # that share the rows of the gated norm's backward pass
FEW_ROWS = 256  # of a decode step


def gated_norm_forward(
    y_BLI: Tensor, z_BLI: Tensor, weight_I: Tensor, groups: int, eps: float
) -> Tensor:
    """`rmsnorm(y * silu(z)) * weight` over each group's channels, in y's dtype.

    Args:
        z_BLI: `[B, L, I]` or, for single tokens, `[B, I]`, maybe a slice of longer rows.
    """
    out_BLI = torch.empty_like(y_BLI)
    inner = y_BLI.shape[-1]
    rows = y_BLI.numel() // inner
    size = inner // groups
    block = triton.next_power_of_2(size)
    # Many rows fill the device with small programs; few are over sooner with more threads each.
    warps = (4 if block >= 1024 else 2) * (1 if rows * groups > FEW_ROWS else 2)
    overlap = rows * groups <= FEW_ROWS and may_overlap(y_BLI)
    gated_norm_forward_kernel[(rows, groups)](
        *(y_BLI, z_BLI, weight_I, out_BLI, eps, inner, row_stride(z_BLI), size, block, overlap),
        num_warps=warps,
        **({"launch_pdl": True} if overlap else {}),
    )
    return out_BLI


def gated_norm_backward(
    dout_BLI: Tensor,
    y_BLI: Tensor,
    z_BLI: Tensor,
    weight_I: Tensor,
    groups: int,
    eps: float,
    dz_BLI: Tensor,
    out_BLI: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write z's gradient into `dz_BLI` (a slice); gradients of y and the weight.

    Args:
        out_BLI: contiguous; if given, the forward pass's result is written there once more.
    """
    inner = y_BLI.shape[-1]
    rows, size = y_BLI.numel() // inner, inner // groups
    block = triton.next_power_of_2(size)
    programs = min(rows, ROW_PROGRAMS)
    dy_BLI = torch.empty_like(y_BLI)
    partial = y_BLI.new_empty((programs, inner), dtype=torch.float32)
    gated_norm_backward_kernel[(programs, groups)](
        *(dout_BLI, y_BLI, z_BLI, weight_I, dy_BLI, dz_BLI, out_BLI, partial, rows, eps),
        *(inner, row_stride(z_BLI), row_stride(dz_BLI), size, block, out_BLI is not None),
        num_warps=8 if block >= 1024 else 4,
    )
    return dy_BLI, partial.sum(0)


@triton.jit
def gated_norm_forward_kernel(
    y, z, weight, out, eps,
    inner: tl.constexpr, z_row: tl.constexpr, size: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, BLOCK)
    keep = c < size
    c += group * size
    y_K = tl.load(y + row * inner + c, mask=keep, other=0.0).to(tl.float32)
    z_K = tl.load(z + row * z_row + c, mask=keep, other=0.0).to(tl.float32)
    w_K = tl.load(weight + c, mask=keep, other=0.0).to(tl.float32)  # not after waiting for the sum
    gated = y_K * z_K * tl.sigmoid(z_K)
    scale = tl.rsqrt(tl.sum(gated * gated, 0) / size + eps)
    tl.store(out + row * inner + c, gated * scale * w_K, mask=keep)


@triton.jit
def gated_norm_backward_kernel(
    dout, y, z, weight, dy, dz, out, partial, rows, eps,
    inner: tl.constexpr, z_row: tl.constexpr, dz_row: tl.constexpr, size: tl.constexpr,
    BLOCK: tl.constexpr, HAS_OUT: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    c = tl.arange(0, BLOCK)
    keep = c < size
    c += group * size
    w_K = tl.load(weight + c, mask=keep, other=0.0).to(tl.float32)
    dweight_K = tl.zeros((BLOCK,), tl.float32)
    row = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0)
    next_y_K = tl.load(y + row * inner + c, mask=keep, other=0.0)
    next_z_K = tl.load(z + row * z_row + c, mask=keep, other=0.0)
    next_dout_K = tl.load(dout + row * inner + c, mask=keep, other=0.0)
    while row < rows:
        y_K, z_K = next_y_K.to(tl.float32), next_z_K.to(tl.float32)
        dout_K = next_dout_K.to(tl.float32)
        # The next row is on its way while this one is computed.
        ahead = keep & (row + step < rows)
        next_y_K = tl.load(y + (row + step) * inner + c, mask=ahead, other=0.0)
        next_z_K = tl.load(z + (row + step) * z_row + c, mask=ahead, other=0.0)
        next_dout_K = tl.load(dout + (row + step) * inner + c, mask=ahead, other=0.0)
        open_K = tl.sigmoid(z_K)
        gate_K = z_K * open_K
        gated = y_K * gate_K
        scale = tl.rsqrt(tl.sum(gated * gated, 0) / size + eps)
        normed = gated * scale
        if HAS_OUT:
            tl.store(out + row * inner + c, normed * w_K, mask=keep)
        dweight_K += dout_K * normed
        dnormed = dout_K * w_K
        dgated = scale * (dnormed - normed * (tl.sum(dnormed * normed, 0) / size))
        tl.store(dy + row * inner + c, dgated * gate_K, mask=keep)
        dz_K = dgated * y_K * open_K * (1.0 + z_K * (1.0 - open_K))
        tl.store(dz + row * dz_row + c, dz_K, mask=keep)
        row += step
    tl.store(partial + tl.program_id(0) * inner + c, dweight_K, mask=keep)
