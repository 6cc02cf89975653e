# mypy: ignore-errors
"""A linear layer on a few rows as a Triton kernel: it takes as long as reading the weights.

Needs triton; a plain function, no autograd, no wait for the device.
Shape suffixes: B rows (few), D inputs, N outputs; in kernels, K inputs and
N outputs of a tile.
"""

import triton
import triton.language as tl
from torch import Tensor

from workbench.linear_step import MAX_NORMED
from workbench.triton_launch import let_next_start, may_overlap, wait_for_previous

PROGRAMS = 4096  # from which on a program takes more outputs


def linear_step(
    x_BD: Tensor,
    weight_ND: Tensor,
    bias_N: Tensor | None,
    residual_BN: Tensor | None,
    norm_D: Tensor | None,
    eps: float,
) -> Tensor:
    """`norm(x) @ weight.T + bias + residual`, `[B, N]`, each sum in float32.

    Args:
        weight_ND, bias_N, norm_D: parameters, which may be read early (`triton_launch`).
        norm_D: weights of an RMSNorm of x, or None for x itself; at most `MAX_NORMED`.
    """
    (batch, inputs), outputs = x_BD.shape, len(weight_ND)
    y_BN = x_BD.new_empty((batch, outputs))
    whole = inputs <= MAX_NORMED
    if norm_D is not None and not whole:
        raise ValueError(f"a norm needs at most {MAX_NORMED} inputs, got {inputs}")
    inputs_tile = triton.next_power_of_2(inputs) if whole else 512 if inputs % 512 == 0 else 256
    outputs_tile = 2 if outputs <= 2 * PROGRAMS or inputs_tile > 2048 else 4
    residual_BN = None if residual_BN is None else residual_BN.contiguous()
    overlap = may_overlap(x_BD)
    kernel = linear_step_kernel if whole else long_linear_step_kernel
    kernel[(triton.cdiv(outputs, outputs_tile),)](
        *(x_BD.contiguous(), weight_ND, bias_N, residual_BN, norm_D, y_BN, outputs, eps),
        *(bias_N is not None, residual_BN is not None, norm_D is not None, overlap),
        *(batch, inputs, outputs_tile, inputs_tile),
        num_warps=2 if inputs_tile > 2048 else 1,
        **({"launch_pdl": True} if overlap else {}),
    )
    return y_BN


@triton.jit
def linear_step_kernel(
    x, weight, bias, residual, norm, y, outputs, eps,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_NORM: tl.constexpr,
    OVERLAP: tl.constexpr, B: tl.constexpr, D: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    n, k = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, K)
    keep_N = n < outputs
    at_NK = weight + n.to(tl.int64)[:, None] * D + k[None, :]
    if K == D:
        w_NK = tl.load(at_NK, mask=keep_N[:, None], other=0.0)
    else:
        w_NK = tl.load(at_NK, mask=keep_N[:, None] & (k < D)[None, :], other=0.0)
    bias_N = tl.zeros((N,), tl.float32)
    if HAS_BIAS:
        bias_N += tl.load(bias + n, mask=keep_N, other=0.0).to(tl.float32)
    if HAS_NORM:
        norm_K = tl.load(norm + k, mask=k < D, other=0.0).to(tl.float32)
    wait_for_previous(OVERLAP)
    for b in tl.static_range(B):
        x_K = tl.load(x + b * D + k, mask=k < D, other=0.0).to(tl.float32)
        y_N = bias_N
        if HAS_RESIDUAL:  # loaded beside x, not after it
            rest_N = tl.load(residual + b * outputs + n, mask=keep_N, other=0.0).to(tl.float32)
        if HAS_NORM:
            sum_N = tl.sum(w_NK.to(tl.float32) * (x_K * norm_K)[None, :], 1)
            y_N += sum_N * tl.rsqrt(tl.sum(x_K * x_K, 0) / D + eps)
        else:
            y_N += tl.sum(w_NK.to(tl.float32) * x_K[None, :], 1)
        if HAS_RESIDUAL:
            y_N += rest_N
        tl.store(y + b * outputs + n, y_N, mask=keep_N)


@triton.jit
def long_linear_step_kernel(
    x, weight, bias, residual, norm, y, outputs, eps,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_NORM: tl.constexpr,
    OVERLAP: tl.constexpr, B: tl.constexpr, D: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
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
