# mypy: ignore-errors
"""Mamba-2's scan backward on a GPU: the states' gradients in one walk, then all chunks at once.

The forward pass leaves the state before every second chunk, the walk here the gradient of the
state after it; what lies between a pair's two chunks is computed again where it is needed. One
program then takes one chunk through the heads of a group, so that dB and dC add up in registers.
The gradient of a token's exponent is a row sum less a column sum of one matrix, from the very same
float32 products, so what must cancel between the two does.
Legend: B batch, L length, T = L rounded up to whole pairs of chunks, H heads, P head dim, G groups,
N state, W its tile, Q tokens of one chunk, V channels of a head that are handled at once.
"""

import triton
import triton.language as tl

from .triton_ssd_forward import (
    LEAST_STEP,
    load_decays,
    load_rows,
    load_state,
    store_rows,
    store_state,
)


@triton.jit
def load_pair_decays(
    total_T, document_T, start, HAS_DOCUMENTS: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr
):
    """As `load_decays`, but over the pair of chunks that has the ROWS tokens from `start`."""
    token = start + tl.arange(0, ROWS)
    first = start // (2 * Q) * (2 * Q)
    is_second = token >= first + Q
    half = tl.load(total_T + first + Q - 1)
    whole = half + tl.load(total_T + first + 2 * Q - 1)
    total = tl.load(total_T + token) + tl.where(is_second, half, 0.0)
    from_start, to_end, through = tl.exp2(total), tl.exp2(whole - total), tl.exp2(whole)
    if HAS_DOCUMENTS:
        begun = tl.load(document_T + first + Q - 1)
        last = begun + tl.load(document_T + first + 2 * Q - 1)
        document = tl.load(document_T + token) + tl.where(is_second, begun, 0)
        from_start = tl.where(document == 0, from_start, 0.0)
        to_end = tl.where(document == last, to_end, 0.0)
        through = tl.where(last == 0, through, 0.0)
    return from_start, to_end, through


@triton.jit(do_not_specialize=["length"])
def state_gradients_kernel(
    dy, C, dfinal, total_BHT, document_BT, dstates, dstart,
    length, padded, heads: tl.constexpr, heads_a_group: tl.constexpr,
    dy_batch, C_batch,
    dy_token: tl.constexpr, dy_head: tl.constexpr, C_token: tl.constexpr, C_group: tl.constexpr,
    HAS_DFINAL: tl.constexpr, HAS_START: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, V: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The gradient of the state after each pair of chunks, and before the first token."""
    h, b = tl.program_id(0) // tl.cdiv(P, V), tl.program_id(1).to(tl.int64)
    channel = (tl.program_id(0) % tl.cdiv(P, V)) * V
    dtype = dy.dtype.element_ty
    dy += b * dy_batch + h * dy_head + channel
    C += b * C_batch + (h // heads_a_group) * C_group
    row = b * heads + h
    total_BHT += row * padded
    document_BT += b * padded
    dstates += (row * (padded // (2 * Q)) * P + channel) * N
    dstate = tl.zeros((W, V), tl.float32)
    if HAS_DFINAL:
        dstate = load_state(dfinal + (row * P + channel) * N, P, V, N, W).to(tl.float32)
    pairs = padded // (2 * Q)
    for i in range(pairs):
        pair = pairs - 1 - i
        store_state(dstates + pair * P * N, dstate.to(dtype), P, V, N, W)
        from_start, _, through = load_pair_decays(
            total_BHT, document_BT, pair * 2 * Q, HAS_DOCUMENTS, Q, 2 * Q
        )
        dy_QV = load_rows(dy, pair * 2 * Q, length, dy_token, 2 * Q, P, V)
        C_QN = load_rows(C, pair * 2 * Q, length, C_token, 2 * Q, N, W)
        gone = (dy_QV.to(tl.float32) * from_start[:, None]).to(dtype)
        dstate = tl.dot(tl.trans(C_QN), gone, acc=dstate * through, input_precision=PRECISION)
    if HAS_START:
        store_state(dstart + (row * P + channel) * N, dstate, P, V, N, W)


@triton.jit(do_not_specialize=["batch", "length"])
def chunk_gradients_kernel(
    x, B, C, D, dy, dt_BHT, total_BHT, source_BHT, document_BT,
    dstates, dx, exponent, direct, dskip, dscores,
    batch, length, padded,
    heads: tl.constexpr, heads_a_group: tl.constexpr, heads_a_program: tl.constexpr,
    x_batch, dy_batch, B_batch, C_batch,
    x_token: tl.constexpr, x_head: tl.constexpr, dy_token: tl.constexpr, dy_head: tl.constexpr,
    B_token: tl.constexpr, B_group: tl.constexpr, C_token: tl.constexpr, C_group: tl.constexpr,
    HAS_D: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, V: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """dx and what happens between tokens; `_chunk` is compiled for a pair's first and second."""
    if tl.program_id(0) % 2 == 0:
        _chunk(
            x, B, C, D, dy, dt_BHT, total_BHT, source_BHT, document_BT,
            dstates, dx, exponent, direct, dskip, dscores,
            batch, length, padded, heads, heads_a_group, heads_a_program,
            x_batch, dy_batch, B_batch, C_batch,
            x_token, x_head, dy_token, dy_head, B_token, B_group, C_token, C_group,
            HAS_D, HAS_DOCUMENTS, False, PRECISION, Q, P, V, N, W,
        )  # fmt: skip
    else:
        _chunk(
            x, B, C, D, dy, dt_BHT, total_BHT, source_BHT, document_BT,
            dstates, dx, exponent, direct, dskip, dscores,
            batch, length, padded, heads, heads_a_group, heads_a_program,
            x_batch, dy_batch, B_batch, C_batch,
            x_token, x_head, dy_token, dy_head, B_token, B_group, C_token, C_group,
            HAS_D, HAS_DOCUMENTS, True, PRECISION, Q, P, V, N, W,
        )  # fmt: skip


@triton.jit
def _chunk(
    x, B, C, D, dy, dt_BHT, total_BHT, source_BHT, document_BT,
    dstates, dx, exponent, direct, dskip, dscores,
    batch, length, padded,
    heads: tl.constexpr, heads_a_group: tl.constexpr, heads_a_program: tl.constexpr,
    x_batch, dy_batch, B_batch, C_batch,
    x_token: tl.constexpr, x_head: tl.constexpr, dy_token: tl.constexpr, dy_head: tl.constexpr,
    B_token: tl.constexpr, B_group: tl.constexpr, C_token: tl.constexpr, C_group: tl.constexpr,
    HAS_D: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, IS_SECOND: tl.constexpr,
    PRECISION: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, V: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    chunk, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    splits = heads_a_group // heads_a_program
    group, split = tl.program_id(1) // splits, tl.program_id(1) % splits
    other = chunk - 1 if IS_SECOND else chunk + 1
    dtype = x.dtype.element_ty
    BLOCKS: tl.constexpr = (P + V - 1) // V
    x += b * x_batch
    dy += b * dy_batch
    B += b * B_batch + group * B_group
    C += b * C_batch + group * C_group
    dx += b * length * heads * P
    document_BT += b * padded
    B_QN = load_rows(B, chunk * Q, length, B_token, Q, N, W)
    C_QN = load_rows(C, chunk * Q, length, C_token, Q, N, W)
    # Matrices over pairs of tokens are [source, target]: so they multiply dy without a transpose.
    if IS_SECOND:
        other_QN = load_rows(B, other * Q, length, B_token, Q, N, W)
        across = tl.dot(C_QN, tl.trans(other_QN), input_precision=PRECISION).to(dtype)
    else:
        other_QN = load_rows(C, other * Q, length, C_token, Q, N, W)
        across = tl.dot(B_QN, tl.trans(other_QN), input_precision=PRECISION).to(dtype)
    dinside = tl.zeros((Q, Q), tl.float32)
    dacross = tl.zeros((Q, Q), tl.float32)
    first_head = group * heads_a_group + split * heads_a_program
    for i in tl.range(heads_a_program * BLOCKS, disable_licm=True):
        h, block = first_head + i // BLOCKS, i % BLOCKS
        row = b * heads + h
        step, total, from_start, to_end, _ = load_decays(
            dt_BHT + row * padded, total_BHT + row * padded, document_BT, chunk, HAS_DOCUMENTS, Q
        )
        other_step, _, other_from_start, other_to_end, other_through = load_decays(
            dt_BHT + row * padded, total_BHT + row * padded, document_BT, other, HAS_DOCUMENTS, Q
        )
        x_QV = load_rows(x + h * x_head + block * V, chunk * Q, length, x_token, Q, P, V)
        dy_QV = load_rows(dy + h * dy_head + block * V, chunk * Q, length, dy_token, Q, P, V)
        pair = ((row * (padded // (2 * Q)) + chunk // 2) * P + block * V) * N
        dlast_NV = load_state(dstates + pair, P, V, N, W)
        if IS_SECOND:
            other_QV = load_rows(x + h * x_head + block * V, other * Q, length, x_token, Q, P, V)
        else:
            other_QV = load_rows(dy + h * dy_head + block * V, other * Q, length, dy_token, Q, P, V)
        to = block * batch * heads + row
        dweights = tl.dot(x_QV, tl.trans(dy_QV), input_precision=PRECISION)
        # A mask that did not seem to change from head to head would be kept, in 32 registers.
        order = i + tl.arange(0, Q)
        mask = order[:, None] <= order[None, :]
        if HAS_DOCUMENTS:
            document = tl.load(document_BT + chunk * Q + tl.arange(0, Q)) + i
            mask = mask & (document[:, None] == document[None, :])
        source = tl.load(source_BHT + row * padded + chunk * Q + tl.arange(0, Q))
        decay = tl.where(mask, tl.exp2(total[None, :] - source[:, None]), 0.0)
        dinside += dweights * decay
        # Computed again for each head: to keep it would cost more registers than there are.
        weights = decay * tl.dot(B_QN, tl.trans(C_QN), input_precision=PRECISION)
        products = weights * dweights
        ddirect = tl.sum(products, 1) / tl.maximum(step, LEAST_STEP)
        dexponent = tl.sum(products, 0)
        if HAS_D:
            diagonal = order[:, None] == order[None, :]
            weights = tl.where(diagonal, weights + tl.load(D + h).to(tl.float32), weights)
            tl.store(dskip + to * (padded // Q) + chunk, tl.sum(tl.where(diagonal, dweights, 0.0)))
        weights = weights.to(dtype)

        dfed = tl.dot(B_QN, dlast_NV, input_precision=PRECISION)
        wide_x = x_QV.to(tl.float32)
        if IS_SECOND:
            fed = (other_QV.to(tl.float32) * (other_step * other_to_end)[:, None]).to(dtype)
            carried = tl.dot(across, fed, input_precision=PRECISION)
            dfrom_start = tl.sum(carried * dy_QV.to(tl.float32), 1) * from_start
        else:
            gone = (other_QV.to(tl.float32) * other_from_start[:, None]).to(dtype)
            dfed = tl.dot(across, gone, acc=dfed * other_through, input_precision=PRECISION)
            fed = (wide_x * (to_end * step)[:, None]).to(dtype)
            dacross = tl.dot(fed, tl.trans(gone), acc=dacross, input_precision=PRECISION)
        ddirect += tl.sum(dfed * wide_x, 1) * to_end
        if IS_SECOND:
            dexponent += dfrom_start

        dx_QV = dfed * (to_end * step)[:, None]
        dx_QV = tl.dot(weights, dy_QV, acc=dx_QV, input_precision=PRECISION)
        store_rows(dx + h * P + block * V, dx_QV, chunk * Q, length, heads * P, Q, P, V)
        token = chunk * Q + tl.arange(0, Q)
        tl.store(direct + to * padded + token, ddirect)
        tl.store(exponent + to * padded + token, dexponent - step * ddirect)
    pairs = padded // (2 * Q)
    dscores += (((b * (heads // heads_a_group) + group) * splits + split) * pairs + chunk // 2) * (
        4 * Q * Q
    )
    at = tl.arange(0, Q)[:, None] * (2 * Q) + tl.arange(0, Q)[None, :]
    if IS_SECOND:
        tl.store(dscores + 2 * Q * Q + at, dacross)  # the later chunk feeds nothing to the earlier
        tl.store(dscores + 2 * Q * Q + Q + at, dinside)
    else:
        tl.store(dscores + at, dinside)
        tl.store(dscores + Q + at, dacross)


@triton.jit(do_not_specialize=["batch", "length"])
def projections_kernel(
    x, B, C, dy, dt_BHT, total_BHT, document_BT, states, dstates, dscores, dB, dC, carry, through,
    batch, length, padded, heads: tl.constexpr, groups: tl.constexpr,
    heads_a_group: tl.constexpr, heads_a_program: tl.constexpr, score_splits,
    x_batch, dy_batch, B_batch, C_batch,
    x_token: tl.constexpr, x_head: tl.constexpr, dy_token: tl.constexpr, dy_head: tl.constexpr,
    B_token: tl.constexpr, B_group: tl.constexpr, C_token: tl.constexpr, C_group: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, V: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """dB and dC of one chunk, by different programs."""
    chunk, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    splits = heads_a_group // heads_a_program
    group, split = tl.program_id(1) // 2 // splits, tl.program_id(1) // 2 % splits
    pair, pairs = chunk // 2, padded // (2 * Q)
    dtype = x.dtype.element_ty
    BLOCKS: tl.constexpr = (P + V - 1) // V
    document_BT += b * padded
    first_head = group * heads_a_group + split * heads_a_program
    dscores += ((b * groups + group) * score_splits * pairs + pair) * (4 * Q * Q)
    B += b * B_batch + group * B_group
    C += b * C_batch + group * C_group
    to = ((split * batch + b) * length * groups + group) * N
    first = chunk * Q
    here = (chunk % 2) * Q + tl.arange(0, Q)
    anywhere = tl.arange(0, 2 * Q)
    if tl.program_id(1) % 2 == 0:
        rows_QQ = tl.zeros((Q, 2 * Q), tl.float32)
        if split == 0:
            for i in range(score_splits):
                at = i * pairs * (4 * Q * Q) + here[:, None] * (2 * Q) + anywhere[None, :]
                rows_QQ += tl.load(dscores + at)
        C_pair = load_rows(C, pair * 2 * Q, length, C_token, 2 * Q, N, W)
        dB_QN = tl.dot(rows_QQ.to(dtype), C_pair, input_precision=PRECISION)
        for i in tl.range(heads_a_program * BLOCKS, disable_licm=True):
            h, block = first_head + i // BLOCKS, i % BLOCKS
            row = b * heads + h
            _, to_end, _ = load_pair_decays(
                total_BHT + row * padded, document_BT, first, HAS_DOCUMENTS, Q, Q
            )
            step = tl.load(dt_BHT + row * padded + first + tl.arange(0, Q))
            x_QV = load_rows(
                x + b * x_batch + h * x_head + block * V, first, length, x_token, Q, P, V
            )
            at = ((row * pairs + pair) * P + block * V) * N
            dlast_NV = load_state(dstates + at, P, V, N, W)
            fed = (x_QV.to(tl.float32) * (to_end * step)[:, None]).to(dtype)
            dB_QN = tl.dot(fed, tl.trans(dlast_NV), acc=dB_QN, input_precision=PRECISION)
        store_rows(dB + to, dB_QN, first, length, groups * N, Q, N, W)
    else:
        columns_QQ = tl.zeros((2 * Q, Q), tl.float32)
        if split == 0:
            for i in range(score_splits):
                at = i * pairs * (4 * Q * Q) + anywhere[:, None] * (2 * Q) + here[None, :]
                columns_QQ += tl.load(dscores + at)
        B_pair = load_rows(B, pair * 2 * Q, length, B_token, 2 * Q, N, W)
        dC_QN = tl.dot(tl.trans(columns_QQ.to(dtype)), B_pair, input_precision=PRECISION)
        C_QN = load_rows(C, first, length, C_token, Q, N, W)
        for i in tl.range(heads_a_program * BLOCKS, disable_licm=True):
            h, block = first_head + i // BLOCKS, i % BLOCKS
            row = b * heads + h
            from_start, _, whole = load_pair_decays(
                total_BHT + row * padded, document_BT, first, HAS_DOCUMENTS, Q, Q
            )
            dy_QV = load_rows(
                dy + b * dy_batch + h * dy_head + block * V, first, length, dy_token, Q, P, V
            )
            state = ((row * pairs + pair) * P + block * V) * N
            first_NV = load_state(states + state, P, V, N, W)
            gone = dy_QV.to(tl.float32) * from_start[:, None]
            carried = tl.dot(C_QN, first_NV, input_precision=PRECISION)
            at = block * batch * heads + row
            tl.store(carry + at * padded + first + tl.arange(0, Q), tl.sum(carried * gone, 1))
            gone = gone.to(dtype)
            dC_QN = tl.dot(gone, tl.trans(first_NV), acc=dC_QN, input_precision=PRECISION)
            if chunk % 2 == 0:
                dlast_NV = load_state(dstates + state, P, V, N, W)
                agreement = load_state(states + state, P, V, N, W).to(tl.float32)
                agreement *= dlast_NV.to(tl.float32)
                tl.store(through + at * pairs + pair, tl.sum(agreement) * whole)
        store_rows(dC + to, dC_QN, first, length, groups * N, Q, N, W)


@triton.jit(do_not_specialize=["batch", "length"])
def steps_kernel(
    exponent, carry, direct, through, dt_BHT, A, ddt, dA, batch, length, padded, heads,
    BLOCKS: tl.constexpr, Q: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """From the gradients of the exponents' running sums to those of dt and, by pair, of A.

    A token's exponent is part of every running sum at it or later. What leaves a pair by its end
    counts there too; but as all that happens inside a pair adds up to nothing over its tokens,
    the sum of the rest is had from the other side: what comes in, less what ends before the token.
    """
    pair, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    token = pair * 2 * Q + tl.arange(0, 2 * Q)
    is_real = (head < heads)[None, :]
    row = b * heads + head
    at = row[None, :] * padded + token[:, None]
    pairs = padded // (2 * Q)
    dtotal = tl.zeros((2 * Q, BLOCK_H), tl.float32)
    ddt_QH = tl.zeros((2 * Q, BLOCK_H), tl.float32)
    incoming = tl.zeros((BLOCK_H,), tl.float32)
    for block in range(BLOCKS):
        shift = block * batch * heads
        carried = tl.load(carry + shift * padded + at, mask=is_real, other=0.0)
        dtotal += tl.load(exponent + shift * padded + at, mask=is_real, other=0.0) + carried
        ddt_QH += tl.load(direct + shift * padded + at, mask=is_real, other=0.0)
        to = (shift + row) * pairs + pair
        incoming += tl.sum(carried, 0) + tl.load(through + to, mask=head < heads, other=0.0)
    da = incoming[None, :] - (tl.cumsum(dtotal, 0) - dtotal)
    rate = tl.load(A + head, mask=head < heads, other=0.0).to(tl.float32)
    ddt_QH += da * rate[None, :]
    step = tl.load(dt_BHT + at, mask=is_real, other=0.0)
    tl.store(dA + (b * pairs + pair) * heads + head, tl.sum(da * step, 0), mask=head < heads)
    at = (b * length + token)[:, None] * heads + head[None, :]
    tl.store(ddt + at, ddt_QH, mask=(token < length)[:, None] & is_real)
