# mypy: ignore-errors
"""One token through Mamba-2's convolution and recurrence, as Triton kernels.

States are updated in place, and computed in float32 whatever they are kept in.
Needs triton; plain functions, no autograd, no wait for the device.
Legend for shapes: B batch, C convolved channels, W width of the filter, H heads, P head dim,
I inner channels (H * P), G groups, N state.
"""

import triton
import triton.language as tl
from torch import Tensor

from workbench.triton_launch import let_next_start, may_overlap, wait_for_previous


def conv_step(x_BC: Tensor, state_BCW: Tensor, weight_CW: Tensor, bias_C: Tensor | None) -> Tensor:
    """One token through the convolution and SiLU, `[B, C]`; shifts `state_BCW` in place."""
    batch, channels = x_BC.shape
    y_BC = x_BC.new_empty((batch, channels))
    block, overlap = 256, may_overlap(x_BC)
    conv_step_kernel[(triton.cdiv(channels, block), batch)](
        *(x_BC, state_BCW, weight_CW, bias_C, y_BC, channels, x_BC.stride(0)),
        *(bias_C is not None, weight_CW.shape[1], block, overlap),
        num_warps=2,
        **({"launch_pdl": True} if overlap else {}),
    )
    return y_BC


def state_step(
    xBC_BC: Tensor,
    raw_BH: Tensor,
    state_BHPN: Tensor,
    A_log_H: Tensor,
    D_H: Tensor,
    dt_bias_H: Tensor,
    groups: int,
    dt_limits: tuple[float, float | None],
) -> Tensor:
    """One token through the recurrence, `[B, H * P]`; updates `state_BHPN` in place.

    Args:
        xBC_BC: x, B and C, convolved, side by side.
        raw_BH: step sizes before bias, softplus and clamping.
    """
    batch, heads, head_dim, n_state = state_BHPN.shape
    y_BI = xBC_BC.new_empty((batch, heads * head_dim))
    rows = min(16, head_dim)
    low, high = dt_limits
    overlap = may_overlap(xBC_BC)
    state_step_kernel[(head_dim // rows, heads, batch)](
        *(xBC_BC, raw_BH, state_BHPN, A_log_H, D_H, dt_bias_H, y_BI),
        *(xBC_BC.stride(0), raw_BH.stride(0), heads, groups, heads // groups),
        *(low, float("inf") if high is None else high),
        *(head_dim, n_state, rows, triton.next_power_of_2(n_state), overlap),
        num_warps=2,
        **({"launch_pdl": True} if overlap else {}),
    )
    return y_BI


@triton.jit
def softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def conv_step_kernel(
    x, state, weight, bias, y, channels, x_row,
    HAS_BIAS: tl.constexpr, W: tl.constexpr, K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    batch = tl.program_id(1).to(tl.int64)
    c_K = tl.program_id(0) * K + tl.arange(0, K)
    keep = c_K < channels
    new_K = tl.load(x + batch * x_row + c_K, mask=keep, other=0.0).to(tl.float32)
    total_K = new_K * tl.load(weight + c_K * W + W - 1, mask=keep, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total_K += tl.load(bias + c_K, mask=keep, other=0.0).to(tl.float32)
    at_K = state + (batch * channels + c_K) * W
    olds = ()
    for k in tl.static_range(W - 1):
        weight_K = tl.load(weight + c_K * W + k, mask=keep, other=0.0).to(tl.float32)
        old_K = tl.load(at_K + k + 1, mask=keep, other=0.0)
        total_K += old_K.to(tl.float32) * weight_K
        olds = olds + (old_K,)  # noqa: RUF005
    for k in tl.static_range(W - 1):  # after all loads, which would wait for a store before them
        tl.store(at_K + k, olds[k], mask=keep)
    tl.store(at_K + W - 1, new_K, mask=keep)
    tl.store(y + batch * channels + c_K, total_K * tl.sigmoid(total_K), mask=keep)


@triton.jit
def state_step_kernel(
    xBC, raw, state, A_log, D, dt_bias, y, x_row, raw_row, heads, groups, heads_a_group, low, high,
    P: tl.constexpr, N_SIZE: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, N)
    keep = n < N_SIZE
    group = head // heads_a_group
    at = state + ((batch * heads + head) * P + p[:, None]) * N_SIZE + n[None, :]
    old = tl.load(at, mask=keep[None, :], other=0.0).to(tl.float32)  # the longest way, so first
    dt = tl.load(raw + batch * raw_row + head).to(tl.float32)
    dt = softplus(dt + tl.load(dt_bias + head).to(tl.float32))
    dt = tl.minimum(tl.maximum(dt, low), high)
    decay = tl.exp(-dt * tl.exp(tl.load(A_log + head).to(tl.float32)))
    row = xBC + batch * x_row
    x_P = tl.load(row + head * P + p).to(tl.float32)
    B_N = tl.load(row + heads * P + group * N_SIZE + n, mask=keep, other=0.0).to(tl.float32)
    C_at = heads * P + (groups + group) * N_SIZE
    C_N = tl.load(row + C_at + n, mask=keep, other=0.0).to(tl.float32)
    skip = tl.load(D + head).to(tl.float32)
    new = old * decay + (dt * x_P)[:, None] * B_N[None, :]
    tl.store(at, new, mask=keep[None, :])
    y_P = tl.sum(new * C_N[None, :], 1) + skip * x_P
    tl.store(y + batch * heads * P + head * P + p, y_P)
