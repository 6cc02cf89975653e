# mypy: ignore-errors
"""What stands around Mamba-2's scan, as Triton kernels: convolution, gated norm, a decode step.

Each takes its slices of the input projection where they lie, and each backward writes its
gradients where they belong in the projection's gradient: no tensor is cut, joined or copied.
Needs triton; plain functions, no autograd, no wait for the device.
Legend for shapes: B batch, L length, R rows of the projection, I inner channels, C convolved ones,
W width of the filter, H heads, P head dim, G groups, N state; T tokens and K channels of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 32  # of a tile of the convolution
ROW_PROGRAMS = 1024  # that share the rows of the gated norm's backward pass


def conv_forward(
    x_BLC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    documents_BL: Tensor | None,
    state_BCW: Tensor | None = None,
) -> Tensor:
    """`silu(conv(x))`, `[B, L, C]`; x may be a slice whose last dimension is contiguous.

    Args:
        documents_BL: int32, the document of each token, numbered from 0 in order.
        state_BCW: the W inputs before the first token, newest last, of document 0.
    """
    batch, length, channels = x_BLC.shape
    y_BLC = x_BLC.new_empty((batch, length, channels))
    block = min(128, triton.next_power_of_2(channels))
    grid = (triton.cdiv(channels, block), triton.cdiv(length, TOKENS), batch)
    conv_forward_kernel[grid](
        *(x_BLC, weight_CW, bias_C, documents_BL, state_BCW, y_BLC, length),
        *(channels, row_stride(x_BLC), bias_C is not None, documents_BL is not None),
        *(state_BCW is not None, weight_CW.shape[1], TOKENS, block),
        num_warps=4,
    )
    return y_BLC


def conv_backward(
    dy_parts: tuple[Tensor, Tensor, Tensor],
    x_BLC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    documents_BL: Tensor | None,
    dx_BLC: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Write the input's gradient into `dx_BLC` (a slice); gradients of weight and bias.

    Args:
        dy_parts: of the channels in three contiguous pieces: `[B, L, I]` and twice `[B, L, G * N]`.
    """
    batch, length, channels = x_BLC.shape
    inner, shared = dy_parts[0].shape[2], dy_parts[1].shape[2]
    block = 64
    while inner % block or shared % block:
        block //= 2
    width, tiles = weight_CW.shape[1], triton.cdiv(length, TOKENS)
    partial = x_BLC.new_empty((batch * tiles, width + 1, channels), dtype=torch.float32)
    conv_backward_kernel[(channels // block, tiles, batch)](
        *dy_parts,
        *(x_BLC, weight_CW, bias_C, documents_BL, dx_BLC, partial, length),
        *(channels, inner, shared, row_stride(x_BLC), row_stride(dx_BLC)),
        *(bias_C is not None, documents_BL is not None, width, TOKENS, block),
        num_warps=8,
    )
    sums = partial.sum(0)
    dweight_CW = sums[:width].t().contiguous().to(weight_CW.dtype)
    return dweight_CW, None if bias_C is None else sums[width].clone()


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
    gated_norm_forward_kernel[(rows, groups)](
        *(y_BLI, z_BLI, weight_I, out_BLI, eps, inner, row_stride(z_BLI), size, block),
        num_warps=4 if block >= 1024 else 2,
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
) -> tuple[Tensor, Tensor]:
    """Write z's gradient into `dz_BLI` (a slice); gradients of y and the weight."""
    inner = y_BLI.shape[-1]
    rows, size = y_BLI.numel() // inner, inner // groups
    block = triton.next_power_of_2(size)
    programs = min(rows, ROW_PROGRAMS)
    dy_BLI = torch.empty_like(y_BLI)
    partial = y_BLI.new_empty((programs, inner), dtype=torch.float32)
    gated_norm_backward_kernel[(programs, groups)](
        *(dout_BLI, y_BLI, z_BLI, weight_I, dy_BLI, dz_BLI, partial, rows, eps),
        *(inner, row_stride(z_BLI), row_stride(dz_BLI), size, block),
        num_warps=8 if block >= 1024 else 4,
    )
    return dy_BLI, partial.sum(0)


def conv_step(x_BC: Tensor, state_BCW: Tensor, weight_CW: Tensor, bias_C: Tensor | None) -> Tensor:
    """One token through the convolution and SiLU, `[B, C]`; shifts `state_BCW` in place."""
    batch, channels = x_BC.shape
    y_BC = x_BC.new_empty((batch, channels))
    block = 256
    conv_step_kernel[(triton.cdiv(channels, block), batch)](
        *(x_BC, state_BCW, weight_CW, bias_C, y_BC, channels, x_BC.stride(0)),
        *(bias_C is not None, weight_CW.shape[1], block),
        num_warps=2,
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
    state_step_kernel[(head_dim // rows, heads, batch)](
        *(xBC_BC, raw_BH, state_BHPN, A_log_H, D_H, dt_bias_H, y_BI),
        *(xBC_BC.stride(0), raw_BH.stride(0), heads, groups, heads // groups),
        *(low, float("inf") if high is None else high),
        *(head_dim, n_state, rows, triton.next_power_of_2(n_state)),
        num_warps=2,
    )
    return y_BI


def row_stride(tensor: Tensor) -> int:
    """Numbers from one token to the next, in a tensor that is a slice of one whole `[..., R]`.

    Kernels take it as a constant: only then are loads known to be aligned, and 16 bytes wide.
    """
    stride = tensor.stride(-2)
    if tensor.stride(-1) != 1 or (tensor.ndim == 3 and tensor.stride(0) != len(tensor[0]) * stride):
        raise ValueError(f"a slice of the last dimension is wanted, got strides {tensor.stride()}")
    return stride


@triton.jit
def softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def tile_rows(x, batch, t_T, c_K, length, channels, ROW: tl.constexpr):
    """A tile `[T, K]` of x at the tokens t_T; zeros outside of the row."""
    keep = ((t_T >= 0) & (t_T < length))[:, None] & (c_K < channels)[None, :]
    at = (batch.to(tl.int64) * length + t_T[:, None]) * ROW + c_K[None, :]
    return tl.load(x + at, mask=keep, other=0.0)


@triton.jit
def documents_of(documents, batch, t_T, length):
    return tl.load(documents + batch * length + t_T, mask=(t_T >= 0) & (t_T < length), other=-1)


@triton.jit
def conv_forward_kernel(
    x, weight, bias, documents, state, y, length, channels: tl.constexpr, ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, HAS_STATE: tl.constexpr,
    W: tl.constexpr, T: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2)
    t_T = tl.program_id(1) * T + tl.arange(0, T)
    c_K = tl.program_id(0) * K + tl.arange(0, K)
    total = tl.zeros((T, K), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + c_K, mask=c_K < channels, other=0.0).to(tl.float32)[None, :]
    if HAS_DOCUMENTS:
        here_T = documents_of(documents, batch, t_T, length)
    for k in tl.static_range(W):
        s_T = t_T - (W - 1) + k
        tap = tile_rows(x, batch, s_T, c_K, length, channels, ROW).to(tl.float32)
        if HAS_STATE:
            before = (s_T < 0)[:, None] & (c_K < channels)[None, :]
            at = (batch.to(tl.int64) * channels + c_K[None, :]) * W + (W + s_T)[:, None]
            tap += tl.load(state + at, mask=before, other=0.0).to(tl.float32)
        if HAS_DOCUMENTS:
            there_T = documents_of(documents, batch, s_T, length)
            if HAS_STATE:
                there_T = tl.where(s_T < 0, 0, there_T)
            tap = tl.where((there_T == here_T)[:, None], tap, 0.0)
        w_K = tl.load(weight + c_K * W + k, mask=c_K < channels, other=0.0).to(tl.float32)
        total += tap * w_K[None, :]
    keep = (t_T < length)[:, None] & (c_K < channels)[None, :]
    at = (batch.to(tl.int64) * length + t_T[:, None]) * channels + c_K[None, :]
    tl.store(y + at, total * tl.sigmoid(total), mask=keep)


@triton.jit
def conv_backward_kernel(
    dy_x, dy_B, dy_C, x, weight, bias, documents, dx, partial, length,
    channels: tl.constexpr, inner: tl.constexpr, shared: tl.constexpr,
    ROW: tl.constexpr, DX_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    W: tl.constexpr, T: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2)
    t_T = tl.program_id(1) * T + tl.arange(0, T)
    first = tl.program_id(0) * K
    c_K = first + tl.arange(0, K)
    # A program's channels lie in one of the three pieces.
    if first < inner:
        dy, wide, from_K = dy_x, inner, c_K
    elif first < inner + shared:
        dy, wide, from_K = dy_B, shared, c_K - inner
    else:
        dy, wide, from_K = dy_C, shared, c_K - inner - shared
    from_K = tl.max_contiguous(tl.multiple_of(from_K, K), K)
    wide = tl.multiple_of(wide, K)
    taps = ()
    places = ()
    for o in tl.static_range(2 * W - 1):
        s_T = t_T - (W - 1) + o
        taps = taps + (  # noqa: RUF005
            tile_rows(x, batch, s_T, c_K, length, channels, ROW).to(tl.float32),
        )
        if HAS_DOCUMENTS:
            places = places + (documents_of(documents, batch, s_T, length),)  # noqa: RUF005
    weights = ()
    for k in tl.static_range(W):
        weights = weights + (tl.load(weight + c_K * W + k).to(tl.float32)[None, :],)  # noqa: RUF005
    dx_TK = tl.zeros((T, K), tl.float32)
    tile = batch * tl.num_programs(1) + tl.program_id(1)
    for j in tl.static_range(W):
        before_TK = tl.zeros((T, K), tl.float32)
        if HAS_BIAS:
            before_TK += tl.load(bias + c_K).to(tl.float32)[None, :]
        for k in tl.static_range(W):
            tap = taps[j + k]
            if HAS_DOCUMENTS:
                tap = tl.where((places[j + k] == places[j + W - 1])[:, None], tap, 0.0)
            before_TK += tap * weights[k]
        gate = tl.sigmoid(before_TK)
        dy_at = (batch.to(tl.int64) * length + t_T[:, None] + j) * wide + from_K[None, :]
        dy_TK = tl.load(dy + dy_at, mask=(t_T + j < length)[:, None], other=0.0)
        dbefore_TK = dy_TK.to(tl.float32) * gate * (1.0 + before_TK * (1.0 - gate))
        if HAS_DOCUMENTS:
            same = places[W - 1] == places[j + W - 1]
            dx_TK += tl.where(same[:, None], dbefore_TK * weights[W - 1 - j], 0.0)
        else:
            dx_TK += dbefore_TK * weights[W - 1 - j]
        if j == 0:
            for k in tl.static_range(W):
                tap = taps[k]
                if HAS_DOCUMENTS:
                    tap = tl.where((places[k] == places[W - 1])[:, None], tap, 0.0)
                at_K = partial + (tile * (W + 1) + k) * channels + c_K
                tl.store(at_K, tl.sum(dbefore_TK * tap, 0))
            tl.store(partial + (tile * (W + 1) + W) * channels + c_K, tl.sum(dbefore_TK, 0))
    at = (batch.to(tl.int64) * length + t_T[:, None]) * DX_ROW + c_K[None, :]
    tl.store(dx + at, dx_TK, mask=(t_T < length)[:, None])


@triton.jit
def gated_norm_forward_kernel(
    y, z, weight, out, eps,
    inner: tl.constexpr, z_row: tl.constexpr, size: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, BLOCK)
    keep = c < size
    c += group * size
    y_K = tl.load(y + row * inner + c, mask=keep, other=0.0).to(tl.float32)
    z_K = tl.load(z + row * z_row + c, mask=keep, other=0.0).to(tl.float32)
    gated = y_K * z_K * tl.sigmoid(z_K)
    scale = tl.rsqrt(tl.sum(gated * gated, 0) / size + eps)
    w_K = tl.load(weight + c, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + row * inner + c, gated * scale * w_K, mask=keep)


@triton.jit
def gated_norm_backward_kernel(
    dout, y, z, weight, dy, dz, partial, rows, eps,
    inner: tl.constexpr, z_row: tl.constexpr, dz_row: tl.constexpr, size: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    c = tl.arange(0, BLOCK)
    keep = c < size
    c += group * size
    w_K = tl.load(weight + c, mask=keep, other=0.0).to(tl.float32)
    dweight_K = tl.zeros((BLOCK,), tl.float32)
    index = tl.program_id(0)
    while index < rows:
        row = index.to(tl.int64)
        y_K = tl.load(y + row * inner + c, mask=keep, other=0.0).to(tl.float32)
        z_K = tl.load(z + row * z_row + c, mask=keep, other=0.0).to(tl.float32)
        dout_K = tl.load(dout + row * inner + c, mask=keep, other=0.0).to(tl.float32)
        open_K = tl.sigmoid(z_K)
        gate_K = z_K * open_K
        gated = y_K * gate_K
        scale = tl.rsqrt(tl.sum(gated * gated, 0) / size + eps)
        normed = gated * scale
        dweight_K += dout_K * normed
        dnormed = dout_K * w_K
        dgated = scale * (dnormed - normed * (tl.sum(dnormed * normed, 0) / size))
        tl.store(dy + row * inner + c, dgated * gate_K, mask=keep)
        dz_K = dgated * y_K * open_K * (1.0 + z_K * (1.0 - open_K))
        tl.store(dz + row * dz_row + c, dz_K, mask=keep)
        index += tl.num_programs(0)
    tl.store(partial + tl.program_id(0) * inner + c, dweight_K, mask=keep)


@triton.jit
def conv_step_kernel(
    x, state, weight, bias, y, channels, x_row,
    HAS_BIAS: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    c_K = tl.program_id(0) * K + tl.arange(0, K)
    keep = c_K < channels
    new_K = tl.load(x + batch * x_row + c_K, mask=keep, other=0.0).to(tl.float32)
    total_K = new_K * tl.load(weight + c_K * W + W - 1, mask=keep, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total_K += tl.load(bias + c_K, mask=keep, other=0.0).to(tl.float32)
    at_K = state + (batch * channels + c_K) * W
    for k in tl.static_range(W - 1):
        old_K = tl.load(at_K + k + 1, mask=keep, other=0.0)
        total_K += old_K.to(tl.float32) * tl.load(weight + c_K * W + k, mask=keep, other=0.0).to(
            tl.float32
        )
        tl.store(at_K + k, old_K, mask=keep)
    tl.store(at_K + W - 1, new_K, mask=keep)
    tl.store(y + batch * channels + c_K, total_K * tl.sigmoid(total_K), mask=keep)


@triton.jit
def state_step_kernel(
    xBC, raw, state, A_log, D, dt_bias, y, x_row, raw_row, heads, groups, heads_a_group, low, high,
    P: tl.constexpr, N_SIZE: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, N)
    keep = n < N_SIZE
    group = head // heads_a_group
    dt = tl.load(raw + batch * raw_row + head).to(tl.float32)
    dt = softplus(dt + tl.load(dt_bias + head).to(tl.float32))
    dt = tl.minimum(tl.maximum(dt, low), high)
    decay = tl.exp(-dt * tl.exp(tl.load(A_log + head).to(tl.float32)))
    row = xBC + batch * x_row
    x_P = tl.load(row + head * P + p).to(tl.float32)
    B_N = tl.load(row + heads * P + group * N_SIZE + n, mask=keep, other=0.0).to(tl.float32)
    C_at = heads * P + (groups + group) * N_SIZE
    C_N = tl.load(row + C_at + n, mask=keep, other=0.0).to(tl.float32)
    at = state + ((batch * heads + head) * P + p[:, None]) * N_SIZE + n[None, :]
    new = tl.load(at, mask=keep[None, :], other=0.0).to(tl.float32) * decay
    new += (dt * x_P)[:, None] * B_N[None, :]
    tl.store(at, new, mask=keep[None, :])
    y_P = tl.sum(new * C_N[None, :], 1) + tl.load(D + head).to(tl.float32) * x_P
    tl.store(y + batch * heads * P + head * P + p, y_P)
