# mypy: ignore-errors
"""Mamba-2's scan forward on a GPU: a program walks one head's chunks, the state in its registers.

The chunks' first states never make a round trip through memory, as they would if the chunks ran
side by side; every second one is written out for the backward pass, if there will be one.
Legend: B batch, L length, T = L rounded up to whole pairs of chunks, H heads, P head dim, G groups,
N state, W its tile, Q tokens of one chunk, V channels of a head that one program handles.
arXiv:2405.21060, section 6.
"""

import triton
import triton.language as tl

# Steps of zero count as this where a logarithm is taken or a product divided by them again.
LEAST_STEP = tl.constexpr(1e-20)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["length"])
def decays_kernel(
    dt, A, dt_BHT, total_BHT, source_BHT, length, padded, heads,
    batch_stride, token_stride, head_stride,
    Q: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Step sizes head by head, zero past the end, and the exponent of 2 since a chunk's start.

    `source` is the latter less the logarithm of the step: the exponent since then of an input.
    """
    chunk, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    token = chunk * Q + tl.arange(0, Q)
    at = b * batch_stride + token[:, None] * token_stride + head[None, :] * head_stride
    is_real = (token < length)[:, None] & (head < heads)[None, :]
    step = tl.load(dt + at, mask=is_real, other=0.0).to(tl.float32)
    rate = tl.load(A + head, mask=head < heads, other=0.0).to(tl.float32) * LOG2_E
    total = tl.cumsum(step * rate[None, :], 0)
    to = (b * heads + head)[None, :] * padded + token[:, None]
    mask = (head < heads)[None, :]
    tl.store(dt_BHT + to, step, mask=mask)
    tl.store(total_BHT + to, total, mask=mask)
    tl.store(source_BHT + to, total - tl.log2(tl.maximum(step, LEAST_STEP)), mask=mask)


@triton.jit(do_not_specialize=["length"])
def documents_kernel(
    seq_idx, document_BT, length, padded, batch_stride, token_stride, Q: tl.constexpr
):
    """How many documents began in the chunk up to each token, that token included."""
    chunk, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = chunk * Q + tl.arange(0, Q)
    ids = seq_idx + b * batch_stride + token * token_stride
    inside = (token > 0) & (token < length)
    here = tl.load(ids, mask=inside, other=0)
    before = tl.load(ids - token_stride, mask=inside, other=0)
    tl.store(document_BT + b * padded + token, tl.cumsum((here != before).to(tl.int32), 0))


@triton.jit
def load_decays(dt_T, total_T, document_T, chunk, HAS_DOCUMENTS: tl.constexpr, Q: tl.constexpr):
    """One chunk's steps and totals, and its decays: from the start, to the end, all through."""
    token = chunk * Q + tl.arange(0, Q)
    step = tl.load(dt_T + token)
    total = tl.load(total_T + token)
    whole = tl.load(total_T + chunk * Q + Q - 1)
    from_start, to_end, through = tl.exp2(total), tl.exp2(whole - total), tl.exp2(whole)
    if HAS_DOCUMENTS:
        document = tl.load(document_T + token)
        last = tl.load(document_T + chunk * Q + Q - 1)
        from_start = tl.where(document == 0, from_start, 0.0)
        to_end = tl.where(document == last, to_end, 0.0)
        through = tl.where(last == 0, through, 0.0)
    return step, total, from_start, to_end, through


@triton.jit
def load_rows(
    pointer, first, length, token_stride: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`[ROWS, TILE]`, zero past the end of the sequence and from COLUMNS on."""
    token, column = first + tl.arange(0, ROWS), tl.arange(0, TILE)
    mask = (token < length)[:, None]
    if COLUMNS < TILE:
        mask = mask & (column < COLUMNS)[None, :]
    at = token[:, None] * token_stride + column[None, :]
    return tl.load(pointer + at, mask=mask, other=0.0)


@triton.jit
def store_rows(
    pointer, value, first, length, token_stride: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    token, column = first + tl.arange(0, ROWS), tl.arange(0, TILE)
    mask = (token < length)[:, None]
    if COLUMNS < TILE:
        mask = mask & (column < COLUMNS)[None, :]
    at = token[:, None] * token_stride + column[None, :]
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_state(pointer, P: tl.constexpr, V: tl.constexpr, N: tl.constexpr, W: tl.constexpr):
    """`[W, V]` of a state that lies as `[P, N]` in memory; zero where it ends."""
    n, p = tl.arange(0, W)[:, None], tl.arange(0, V)[None, :]
    if (P < V) | (N < W):
        state = tl.load(pointer + n + p * N, mask=(n < N) & (p < P), other=0.0)
    else:
        state = tl.load(pointer + n + p * N)
    return state


@triton.jit
def store_state(pointer, state, P: tl.constexpr, V: tl.constexpr, N: tl.constexpr, W: tl.constexpr):
    n, p = tl.arange(0, W)[:, None], tl.arange(0, V)[None, :]
    if (P < V) | (N < W):
        tl.store(pointer + n + p * N, state, mask=(n < N) & (p < P))
    else:
        tl.store(pointer + n + p * N, state)


@triton.jit(do_not_specialize=["length"])
def scan_kernel(
    x, B, C, D, start, dt_BHT, total_BHT, source_BHT, document_BT, y, states, final,
    length, padded, heads: tl.constexpr, heads_a_group: tl.constexpr,
    x_batch, B_batch, C_batch, x_token: tl.constexpr, x_head: tl.constexpr,
    B_token: tl.constexpr, B_group: tl.constexpr, C_token: tl.constexpr, C_group: tl.constexpr,
    HAS_D: tl.constexpr, HAS_START: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, V: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    h, b = tl.program_id(0) // tl.cdiv(P, V), tl.program_id(1).to(tl.int64)
    channel = (tl.program_id(0) % tl.cdiv(P, V)) * V
    dtype = x.dtype.element_ty
    x += b * x_batch + h * x_head + channel
    y += b * length * heads * P + h * P + channel
    B += b * B_batch + (h // heads_a_group) * B_group
    C += b * C_batch + (h // heads_a_group) * C_group
    row = b * heads + h
    dt_BHT += row * padded
    total_BHT += row * padded
    source_BHT += row * padded
    document_BT += b * padded
    states += (row * (padded // (2 * Q)) * P + channel) * N
    state = tl.zeros((W, V), tl.float32)
    if HAS_START:
        state = load_state(start + (row * P + channel) * N, P, V, N, W).to(tl.float32)
    if HAS_D:
        skip = tl.load(D + h).to(tl.float32)
    for chunk in tl.range(tl.cdiv(length, Q), disable_licm=True):
        step, total, from_start, to_end, through = load_decays(
            dt_BHT, total_BHT, document_BT, chunk, HAS_DOCUMENTS, Q
        )
        x_QV = load_rows(x, chunk * Q, length, x_token, Q, P, V)
        B_QN = load_rows(B, chunk * Q, length, B_token, Q, N, W)
        C_QN = load_rows(C, chunk * Q, length, C_token, Q, N, W)
        scores = tl.dot(C_QN, tl.trans(B_QN), input_precision=PRECISION)
        # A mask that did not seem to change from chunk to chunk would be kept, in 32 registers.
        token = chunk * Q + tl.arange(0, Q)
        mask = token[:, None] >= token[None, :]
        if HAS_DOCUMENTS:
            document = tl.load(document_BT + token)
            mask = mask & (document[:, None] == document[None, :])
        decay = tl.exp2(total[:, None] - tl.load(source_BHT + token)[None, :])
        weights = tl.where(mask, scores * decay, 0.0)  # above the diagonal the decay overflows
        if HAS_D:
            weights = tl.where(token[:, None] == token[None, :], weights + skip, weights)
        weights = weights.to(dtype)
        first = state.to(dtype)
        if SAVE:  # noqa: SIM102 - known while compiling, the other is not
            if chunk % 2 == 0:
                store_state(states + (chunk // 2) * P * N, first, P, V, N, W)
        y_QV = tl.dot(C_QN, first, input_precision=PRECISION) * from_start[:, None]
        y_QV = tl.dot(weights, x_QV, acc=y_QV, input_precision=PRECISION)
        store_rows(y, y_QV, chunk * Q, length, heads * P, Q, P, V)
        fed = (x_QV.to(tl.float32) * (step * to_end)[:, None]).to(dtype)
        state = tl.dot(tl.trans(B_QN), fed, acc=state * through, input_precision=PRECISION)
    store_state(final + (row * P + channel) * N, state, P, V, N, W)
