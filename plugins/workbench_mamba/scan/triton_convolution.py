# mypy: ignore-errors
"""A short causal convolution and its SiLU as Triton kernels, forward and backward.

Both take slices of longer rows where they lie, and the backward pass writes the input's gradient
where it belongs: no tensor is cut, joined or copied.
Needs triton; plain functions, no autograd, no wait for the device.
Legend for shapes: B batch, L length, I inner channels, C convolved ones, W width of the filter,
G groups, N state; T tokens and K channels of a program, which walks along the tokens: a channel's
neighbours in time stay in its registers, and sums over tokens need no exchange.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_mamba.scan.triton_rows import row_stride

MAX_WIDTH = 4  # inputs that the kernels hold at a time
TOKENS = 128  # that a program walks along
FORWARD_ROWS, BACKWARD_ROWS = 8, 4  # loaded at a time


def conv_forward(
    x_BLC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    documents_BL: Tensor | None,
    state_BCW: Tensor | None = None,
) -> Tensor:
    """`silu(conv(x))`, `[B, L, C]`; x may be a slice whose last dimension is contiguous.

    Args:
        weight_CW: at most `MAX_WIDTH` wide.
        documents_BL: int32, the document of each token, numbered from 0 in order.
        state_BCW: the W inputs before the first token, newest last, of document 0.
    """
    batch, length, channels = x_BLC.shape
    y_BLC = x_BLC.new_empty((batch, length, channels))
    block = min(256, triton.next_power_of_2(channels))
    tokens = tokens_of(length)
    grid = (triton.cdiv(channels, block), triton.cdiv(length, tokens), batch)
    conv_forward_kernel[grid](
        *(x_BLC, weight_CW, bias_C, documents_BL, state_BCW, y_BLC, length),
        *(channels, row_stride(x_BLC), bias_C is not None, documents_BL is not None),
        *(state_BCW is not None, weight_CW.shape[1], tokens, FORWARD_ROWS, block),
        num_warps=max(1, block // 128),
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
    tokens, width = tokens_of(length), weight_CW.shape[1]
    tiles = triton.cdiv(length, tokens)
    partial = x_BLC.new_empty((batch * tiles, width + 1, channels), dtype=torch.float32)
    conv_backward_kernel[(channels // block, tiles, batch)](
        *dy_parts,
        *(x_BLC, weight_CW, bias_C, documents_BL, dx_BLC, partial, length),
        *(channels, inner, shared, row_stride(x_BLC), row_stride(dx_BLC)),
        *(bias_C is not None, documents_BL is not None, width, tokens, BACKWARD_ROWS, block),
        num_warps=1,
    )
    sums = partial.sum(0)
    dweight_CW = sums[:width].t().contiguous().to(weight_CW.dtype)
    return dweight_CW, None if bias_C is None else sums[width].clone()


def tokens_of(length: int) -> int:
    """Tokens of a program: a power of two, no more than a short row needs."""
    return max(FORWARD_ROWS, min(TOKENS, triton.next_power_of_2(length)))


@triton.jit
def tap_weight(weight, c_K, keep_K, distance: tl.constexpr, W: tl.constexpr):
    """The filter's value for the input `distance` tokens back; 0 beyond its width."""
    inside: tl.constexpr = distance < W
    at_K = weight + c_K * W + (W - 1 - distance if inside else 0)
    return tl.load(at_K, mask=keep_K & inside, other=0.0).to(tl.float32)


@triton.jit
def input_row(
    x, state, batch, t, c_K, keep_K, length, channels: tl.constexpr, ROW: tl.constexpr,
    HAS_STATE: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The inputs of token t, float32; those before the first token are the state's, or zeros."""
    inside = (t >= 0) & (t < length)
    at_K = (batch.to(tl.int64) * length + t) * ROW + c_K
    row_K = tl.load(x + at_K, mask=keep_K & inside, other=0.0).to(tl.float32)
    if HAS_STATE:
        held = (t < 0) & (t >= -W)
        at_K = (batch.to(tl.int64) * channels + c_K) * W + (W + t)
        row_K += tl.load(state + at_K, mask=keep_K & held, other=0.0).to(tl.float32)
    return row_K


@triton.jit
def document_of(documents, batch, t, length, HAS_DOCUMENTS: tl.constexpr):
    """The document of token t; a state's inputs are of document 0."""
    place = 0
    if HAS_DOCUMENTS:
        inside = (t >= 0) & (t < length)
        place = tl.load(documents + batch * length + t, mask=inside, other=0)
    return place


@triton.jit
def conv_forward_kernel(
    x, weight, bias, documents, state, y, length, channels: tl.constexpr, ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, HAS_STATE: tl.constexpr,
    W: tl.constexpr, T: tl.constexpr, U: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2)
    first = tl.program_id(1) * T
    c_K = tl.program_id(0) * K + tl.arange(0, K)
    keep_K = c_K < channels
    w0_K, w1_K = tap_weight(weight, c_K, keep_K, 0, W), tap_weight(weight, c_K, keep_K, 1, W)
    w2_K, w3_K = tap_weight(weight, c_K, keep_K, 2, W), tap_weight(weight, c_K, keep_K, 3, W)
    bias_K = tl.zeros((K,), tl.float32)
    if HAS_BIAS:
        bias_K += tl.load(bias + c_K, mask=keep_K, other=0.0).to(tl.float32)
    # The three inputs before the one at hand, and the documents that they belong to.
    x1_K = input_row(x, state, batch, first - 1, c_K, keep_K, length, channels, ROW, HAS_STATE, W)
    x2_K = input_row(x, state, batch, first - 2, c_K, keep_K, length, channels, ROW, HAS_STATE, W)
    x3_K = input_row(x, state, batch, first - 3, c_K, keep_K, length, channels, ROW, HAS_STATE, W)
    p1 = document_of(documents, batch, first - 1, length, HAS_DOCUMENTS)
    p2 = document_of(documents, batch, first - 2, length, HAS_DOCUMENTS)
    p3 = document_of(documents, batch, first - 3, length, HAS_DOCUMENTS)
    for start in range(0, T, U):
        rows, places = (), ()
        for u in tl.static_range(U):
            t = first + start + u
            row_K = input_row(x, state, batch, t, c_K, keep_K, length, channels, ROW, False, W)
            rows = rows + (row_K,)  # noqa: RUF005
            place = document_of(documents, batch, t, length, HAS_DOCUMENTS)
            places = places + (place,)  # noqa: RUF005
        for u in tl.static_range(U):
            t, x0_K, p0 = first + start + u, rows[u], places[u]
            total_K = bias_K + x0_K * w0_K
            if HAS_DOCUMENTS:
                total_K += tl.where(p1 == p0, x1_K, 0.0) * w1_K
                total_K += tl.where(p2 == p0, x2_K, 0.0) * w2_K
                total_K += tl.where(p3 == p0, x3_K, 0.0) * w3_K
            else:
                total_K += x1_K * w1_K + x2_K * w2_K + x3_K * w3_K
            at_K = (batch.to(tl.int64) * length + t) * channels + c_K
            tl.store(y + at_K, total_K * tl.sigmoid(total_K), mask=keep_K & (t < length))
            x3_K, x2_K, x1_K = x2_K, x1_K, x0_K
            p3, p2, p1 = p2, p1, p0


@triton.jit
def conv_backward_kernel(
    dy_x, dy_B, dy_C, x, weight, bias, documents, dx, partial, length,
    channels: tl.constexpr, inner: tl.constexpr, shared: tl.constexpr,
    ROW: tl.constexpr, DX_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    W: tl.constexpr, T: tl.constexpr, U: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2)
    first = tl.program_id(1) * T
    first_channel = tl.program_id(0) * K
    c_K = first_channel + tl.arange(0, K)
    keep_K = c_K < channels
    # A program's channels lie in one of the three pieces.
    if first_channel < inner:
        dy, wide, from_K = dy_x, inner, c_K
    elif first_channel < inner + shared:
        dy, wide, from_K = dy_B, shared, c_K - inner
    else:
        dy, wide, from_K = dy_C, shared, c_K - inner - shared
    from_K = tl.max_contiguous(tl.multiple_of(from_K, K), K)
    wide = tl.multiple_of(wide, K)
    w0_K, w1_K = tap_weight(weight, c_K, keep_K, 0, W), tap_weight(weight, c_K, keep_K, 1, W)
    w2_K, w3_K = tap_weight(weight, c_K, keep_K, 2, W), tap_weight(weight, c_K, keep_K, 3, W)
    bias_K = tl.zeros((K,), tl.float32)
    if HAS_BIAS:
        bias_K += tl.load(bias + c_K).to(tl.float32)
    x1_K = input_row(x, x, batch, first - 1, c_K, keep_K, length, channels, ROW, False, W)
    x2_K = input_row(x, x, batch, first - 2, c_K, keep_K, length, channels, ROW, False, W)
    x3_K = input_row(x, x, batch, first - 3, c_K, keep_K, length, channels, ROW, False, W)
    p1 = document_of(documents, batch, first - 1, length, HAS_DOCUMENTS)
    p2 = document_of(documents, batch, first - 2, length, HAS_DOCUMENTS)
    p3 = document_of(documents, batch, first - 3, length, HAS_DOCUMENTS)
    # Gradients before the SiLU of the three tokens before: an input's gradient needs its own
    # token's and theirs after it, so that it is written three tokens late.
    d1_K, d2_K, d3_K = bias_K * 0.0, bias_K * 0.0, bias_K * 0.0
    dw0_K, dw1_K, dw2_K, dw3_K = bias_K * 0.0, bias_K * 0.0, bias_K * 0.0, bias_K * 0.0
    dbias_K = bias_K * 0.0
    for start in range(0, T + U, U):
        rows, slopes, places = (), (), ()
        for u in tl.static_range(U):
            t = first + start + u
            row_K = input_row(x, x, batch, t, c_K, keep_K, length, channels, ROW, False, W)
            rows = rows + (row_K,)  # noqa: RUF005
            at_K = (batch.to(tl.int64) * length + t) * wide + from_K
            dy_K = tl.load(dy + at_K, mask=keep_K & (t < length), other=0.0)
            slopes = slopes + (dy_K.to(tl.float32),)  # noqa: RUF005
            place = document_of(documents, batch, t, length, HAS_DOCUMENTS)
            places = places + (place,)  # noqa: RUF005
        for u in tl.static_range(U):
            t, x0_K, p0 = first + start + u, rows[u], places[u]
            y1_K, y2_K, y3_K = x1_K, x2_K, x3_K
            if HAS_DOCUMENTS:
                y1_K = tl.where(p1 == p0, x1_K, 0.0)
                y2_K = tl.where(p2 == p0, x2_K, 0.0)
                y3_K = tl.where(p3 == p0, x3_K, 0.0)
            before_K = bias_K + x0_K * w0_K + y1_K * w1_K + y2_K * w2_K + y3_K * w3_K
            gate_K = tl.sigmoid(before_K)
            d0_K = slopes[u] * gate_K * (1.0 + before_K * (1.0 - gate_K))
            # Of tokens beyond its own a program only hands the gradient on.
            own_K = tl.where(t < first + T, d0_K, 0.0)
            dbias_K += own_K
            dw0_K += own_K * x0_K
            dw1_K += own_K * y1_K
            dw2_K += own_K * y2_K
            dw3_K += own_K * y3_K
            if HAS_DOCUMENTS:
                dx_K = d3_K * w0_K + tl.where(p2 == p3, d2_K * w1_K, 0.0)
                dx_K += tl.where(p1 == p3, d1_K * w2_K, 0.0)
                dx_K += tl.where(p0 == p3, d0_K * w3_K, 0.0)
            else:
                dx_K = d3_K * w0_K + d2_K * w1_K + d1_K * w2_K + d0_K * w3_K
            at_K = (batch.to(tl.int64) * length + t - 3) * DX_ROW + c_K
            due = (t - 3 >= first) & (t - 3 < first + T) & (t - 3 < length)
            tl.store(dx + at_K, dx_K, mask=keep_K & due)
            x3_K, x2_K, x1_K = x2_K, x1_K, x0_K
            d3_K, d2_K, d1_K = d2_K, d1_K, d0_K
            p3, p2, p1 = p2, p1, p0
    tile = batch * tl.num_programs(1) + tl.program_id(1)
    sums_K = partial + tile.to(tl.int64) * (W + 1) * channels + c_K
    tl.store(sums_K + W * channels, dbias_K)
    tl.store(sums_K + (W - 1) * channels, dw0_K)
    if W > 1:
        tl.store(sums_K + (W - 2) * channels, dw1_K)
    if W > 2:
        tl.store(sums_K + (W - 3) * channels, dw2_K)
    if W > 3:
        tl.store(sums_K + (W - 4) * channels, dw3_K)
