# mypy: ignore-errors
"""One token through Mamba-2's convolution, recurrence and gated norm, as two Triton kernels.

The first reads the convolution's window where each head needs it and the second moves it on: no
program writes what another may still read. States are updated in place, and computed in float32
whatever they are kept in.
Needs triton; plain functions, no autograd, no wait for the device.
Legend for shapes: B batch, R rows of the projection, C convolved channels, W width of the filter,
H heads, P head dim, I inner channels (H * P), G groups, N state.
"""

import triton
import triton.language as tl
from torch import Tensor

MOVED = 256  # channels of the window that a program moves on
SMALL = 512  # heads of all sequences, below which a head is shared by more programs


def state_step(
    xBC_BC: Tensor,
    raw_BH: Tensor,
    window_BCW: Tensor,
    state_BHPN: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    dt_bias_H: Tensor,
    A_log_H: Tensor,
    D_H: Tensor,
    groups: int,
    dt_limits: tuple[float, float | None],
) -> Tensor:
    """One token through convolution and recurrence, `[B, H * P]`; updates `state_BHPN` in place.

    Args:
        xBC_BC: the convolution's input, x, B and C side by side.
        raw_BH: step sizes before bias, softplus and clamping.
        window_BCW: the last W inputs of the convolution before this one; left as they are.
    """
    batch, heads, head_dim, n_state = state_BHPN.shape
    y_BI = xBC_BC.new_empty((batch, heads * head_dim))
    rows = min(8 if batch * heads < SMALL else 32, head_dim)
    low, high = dt_limits
    state_step_kernel[(head_dim // rows, heads, batch)](
        *(xBC_BC, raw_BH, window_BCW, state_BHPN, weight_CW, bias_C, dt_bias_H, A_log_H, D_H),
        *(y_BI, xBC_BC.stride(0), raw_BH.stride(0), heads, groups, heads // groups),
        *(low, float("inf") if high is None else high, bias_C is not None),
        *(weight_CW.shape[1], head_dim, n_state, rows, triton.next_power_of_2(n_state)),
        triton.next_power_of_2(weight_CW.shape[1]),
        num_warps=2 if rows <= 8 else 4,
    )
    return y_BI


def norm_step(
    y_BI: Tensor,
    z_BI: Tensor,
    xBC_BC: Tensor,
    window_BCW: Tensor,
    weight_I: Tensor,
    groups: int,
    eps: float,
) -> Tensor:
    """`rmsnorm(y * silu(z)) * weight` over each group's channels; moves the window on in place."""
    (batch, inner), channels = y_BI.shape, xBC_BC.shape[1]
    out_BI = y_BI.new_empty((batch, inner))
    size = inner // groups
    block = triton.next_power_of_2(size)
    norm_step_kernel[(batch, groups + triton.cdiv(channels, MOVED))](
        *(y_BI, z_BI, xBC_BC, window_BCW, weight_I, out_BI, eps, z_BI.stride(0), xBC_BC.stride(0)),
        *(channels, groups, inner, size, window_BCW.shape[2], block, MOVED),
        num_warps=2 if block < 1024 else 8 if batch <= 64 else 4,
    )
    return out_BI


@triton.jit
def softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def convolved(
    x, window, weight, bias, c, keep, HAS_BIAS: tl.constexpr, W: tl.constexpr, TAPS: tl.constexpr
):
    """Filter and SiLU at channels `c` of a sequence, in float32.

    The taps are a dimension of the tile, and not a loop: threads share them instead of repeating
    all loads for each row of the state that they hold.
    """
    tap = tl.arange(0, TAPS)
    at = c[:, None] * W + tap[None, :]
    real = keep[:, None] & (tap < W)[None, :]
    last = keep[:, None] & (tap == W - 1)[None, :]
    value = tl.load(window + at + 1, mask=real & (tap < W - 1)[None, :], other=0.0).to(tl.float32)
    value += tl.load(x + c[:, None] + tap[None, :] * 0, mask=last, other=0.0).to(tl.float32)
    value *= tl.load(weight + at, mask=real, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + c[:, None] + tap[None, :] * 0, mask=last, other=0.0).to(tl.float32)
    total = tl.sum(value, 1)
    return total * tl.sigmoid(total)


@triton.jit
def state_step_kernel(
    xBC, raw, window, state, weight, bias, dt_bias, A_log, D, y,
    x_row, raw_row, heads, groups, heads_a_group, low, high,
    HAS_BIAS: tl.constexpr, W: tl.constexpr, P: tl.constexpr, N_SIZE: tl.constexpr,
    ROWS: tl.constexpr, N: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, N)
    keep = n < N_SIZE
    at = state + ((batch * heads + head) * P + p[:, None]) * N_SIZE + n[None, :]
    old = tl.load(at, mask=keep[None, :], other=0.0)  # first: it is what takes long
    dt = tl.load(raw + batch * raw_row + head).to(tl.float32)
    dt = softplus(dt + tl.load(dt_bias + head).to(tl.float32))
    dt = tl.minimum(tl.maximum(dt, low), high)
    decay = tl.exp(-dt * tl.exp(tl.load(A_log + head).to(tl.float32)))
    group = head // heads_a_group
    B_at = heads * P + group * N_SIZE
    C_at = B_at + groups * N_SIZE
    row = xBC + batch * x_row
    seen = window + batch * (heads * P + 2 * groups * N_SIZE) * W
    x_P = convolved(row, seen, weight, bias, head * P + p, p < P, HAS_BIAS, W, TAPS)
    B_N = convolved(row, seen, weight, bias, B_at + n, keep, HAS_BIAS, W, TAPS)
    C_N = convolved(row, seen, weight, bias, C_at + n, keep, HAS_BIAS, W, TAPS)
    new = old.to(tl.float32) * decay + (dt * x_P)[:, None] * B_N[None, :]
    tl.store(at, new, mask=keep[None, :])
    y_P = tl.sum(new * C_N[None, :], 1) + tl.load(D + head).to(tl.float32) * x_P
    tl.store(y + batch * heads * P + head * P + p, y_P)


@triton.jit
def norm_step_kernel(
    y, z, xBC, window, weight, out, eps, z_row, x_row, channels, groups,
    inner: tl.constexpr, size: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
    MOVED: tl.constexpr,
):  # fmt: skip
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if group < groups:
        c = tl.arange(0, BLOCK)
        keep = c < size
        c += group * size
        y_K = tl.load(y + row * inner + c, mask=keep, other=0.0).to(tl.float32)
        z_K = tl.load(z + row * z_row + c, mask=keep, other=0.0).to(tl.float32)
        w_K = tl.load(weight + c, mask=keep, other=0.0).to(tl.float32)
        gated_K = y_K * z_K * tl.sigmoid(z_K)
        scale = tl.rsqrt(tl.sum(gated_K * gated_K, 0) / size + eps)
        tl.store(out + row * inner + c, gated_K * scale * w_K, mask=keep)
    else:
        move_on(xBC + row * x_row, window + row * channels * W, channels, group - groups, W, MOVED)


@triton.jit
def move_on(x, window, channels, block, W: tl.constexpr, MOVED: tl.constexpr):
    """Shift a sequence's window by one token, in `MOVED` of its channels."""
    c = block * MOVED + tl.arange(0, MOVED)
    keep = c < channels
    new = tl.load(x + c, mask=keep, other=0.0)
    for k in tl.static_range(W - 1):
        later = tl.load(window + c * W + k + 1, mask=keep, other=0.0)
        tl.store(window + c * W + k, later, mask=keep)
    tl.store(window + c * W + W - 1, new, mask=keep)
