# mypy: ignore-errors
"""A linear layer on a few rows as a Triton kernel: it takes as long as reading the weights.

Needs triton; a plain function, no autograd, no wait for the device.
Shape suffixes: B rows (few), D inputs, N outputs; in kernels, K inputs and
N outputs of a tile.
"""

import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 4096  # from which on a program takes more outputs


def linear_step(
    x_BD: Tensor, weight_ND: Tensor, bias_N: Tensor | None, residual_BN: Tensor | None
) -> Tensor:
    """`x @ weight.T + bias + residual`, `[B, N]`, each sum in float32."""
    (batch, inputs), outputs = x_BD.shape, len(weight_ND)
    y_BN = x_BD.new_empty((batch, outputs))
    inputs_tile = 512 if inputs % 512 == 0 else 256
    outputs_tile = 2 if outputs <= 2 * PROGRAMS else 4
    residual_BN = None if residual_BN is None else residual_BN.contiguous()
    linear_step_kernel[(triton.cdiv(outputs, outputs_tile),)](
        *(x_BD.contiguous(), weight_ND, bias_N, residual_BN, y_BN, outputs),
        *(bias_N is not None, residual_BN is not None, batch, inputs, outputs_tile, inputs_tile),
        num_warps=1,
    )
    return y_BN


@triton.jit
def linear_step_kernel(
    x, weight, bias, residual, y, outputs,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    B: tl.constexpr, D: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    n, k = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, K)
    keep_N = n < outputs
    row_N = weight + n.to(tl.int64) * D
    for b in tl.static_range(B):  # from the second row on, the weights come from the cache
        y_N = tl.zeros((N,), tl.float32)  # loaded beside the weights, not after them
        if HAS_BIAS:
            y_N += tl.load(bias + n, mask=keep_N, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            y_N += tl.load(residual + b * outputs + n, mask=keep_N, other=0.0).to(tl.float32)
        sum_NK = tl.zeros((N, K), tl.float32)
        for start in tl.static_range(0, D, K):
            at_K = start + k
            keep_NK = keep_N[:, None]
            if start + K > D:
                keep_NK = keep_NK & (at_K < D)[None, :]
                x_K = tl.load(x + b * D + at_K, mask=at_K < D, other=0.0)
            else:
                x_K = tl.load(x + b * D + at_K)
            w_NK = tl.load(row_N[:, None] + at_K[None, :], mask=keep_NK, other=0.0)
            sum_NK += w_NK.to(tl.float32) * x_K.to(tl.float32)[None, :]
        y_N += tl.sum(sum_NK, 1)
        tl.store(y + b * outputs + n, y_N, mask=keep_N)
