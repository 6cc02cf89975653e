# mypy: ignore-errors
"""Triton kernels of the selective scan's backward pass.

A program is one warp, two lanes a channel: each has half its states, and sums over channels stay
in the warp. It goes through its tokens from the last to the first, a chunk at a time: for each it
finds the state before it again, from the one kept before the chunk, and then its gradients. The
sums over channels, for the gradients of B and C, are the costly part: a warp reduces all the
products of a token together, and writes one partial sum a block of channels.

Legend for shapes: B batch, L length, D channels, N state, S segments, K chunks, P channel blocks.
"""

import triton
import triton.language as tl

from .triton_selective_steps import (
    LN_2,
    combine_segments,
    decay,
    load_channel,
    load_row,
    load_rows,
    load_state,
    load_state_matrix,
    load_tokens,
    split_pair,
    starts_document,
    state_at,
    step_sizes,
    store_segment,
    store_token,
)
from .triton_selective_sums import places_of_sums, store_sums, sum_channels


@triton.jit(do_not_specialize=["zero"])
def segment_adjoints(
    dy, delta, A, packed, bias, seq, local, decays, dy_b, delta_b, seq_b, L, segment, S, zero,
    DY_ROW: tl.constexpr, DELTA_ROW: tl.constexpr, D_SIZE: tl.constexpr, N_SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr, SOFTPLUS: tl.constexpr, WHOLE: tl.constexpr,
    EVEN: tl.constexpr, ASSEMBLY: tl.constexpr, N: tl.constexpr, BD: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """What every segment but the first hands to the left from a zero adjoint, and its decay."""
    batch, s = tl.program_id(1).to(tl.int64), tl.program_id(2) + 1
    d_D, n_N = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, N)
    mask_D = d_D < D_SIZE
    A2_ND = load_state_matrix(A, d_D, n_N, D_SIZE, N_SIZE, zero)
    bias_D = load_channel(bias, d_D, mask_D, HAS_BIAS)
    first = s * segment
    t = first + (tl.cdiv(tl.minimum(first + segment, L) - first, CHUNK) - 1) * CHUNK
    dy_D = dy + (batch * dy_b + t.to(tl.int64) * DY_ROW) + d_D
    delta_D = delta + (batch * delta_b + t.to(tl.int64) * DELTA_ROW) + d_D
    row = packed + (batch * L + t) * N
    if HAS_SEQ:
        seq += batch * seq_b
    carry_ND = tl.zeros((N, BD), tl.float32)
    total_D = tl.zeros((BD,), tl.float32)
    kept = 1.0
    dys = load_tokens(dy_D, DY_ROW, t, L, mask_D, CHUNK, WHOLE, EVEN)
    raw = load_tokens(delta_D, DELTA_ROW, t, L, mask_D, CHUNK, WHOLE, EVEN)
    pairs = load_rows(row, N, BD, CHUNK)
    while t >= first:
        hop = tl.where(t > first, CHUNK, 0)
        dy_D -= hop * DY_ROW
        delta_D -= hop * DELTA_ROW
        next_dys = load_tokens(dy_D, DY_ROW, t - hop, L, mask_D, CHUNK, WHOLE, EVEN)
        next_raw = load_tokens(delta_D, DELTA_ROW, t - hop, L, mask_D, CHUNK, WHOLE, EVEN)
        row -= hop * N
        next_pairs = load_rows(row, N, BD, CHUNK)
        deltas, _ = step_sizes(raw, bias_D, t, L, CHUNK, SOFTPLUS, WHOLE, ASSEMBLY)
        for j in tl.static_range(CHUNK - 1, -1, -1):
            starts = starts_document(seq, t + j, L, HAS_SEQ)
            a_ND = decay(deltas[j], A2_ND, starts, HAS_SEQ)
            _, c_ND = split_pair(pairs[j])
            carry_ND = a_ND * (carry_ND + c_ND * dys[j].to(tl.float32)[None, :])
            total_D += deltas[j]
            if HAS_SEQ:
                kept = tl.where(starts, 0.0, kept)
        dys, raw, pairs = next_dys, next_raw, next_pairs
        t -= CHUNK
    store_segment(
        *(local, decays, carry_ND, total_D, kept, A2_ND, batch * S + s),
        *(n_N, d_D, mask_D, D_SIZE, zero, N),
    )


@triton.jit
def advance(h_ND, u_D, delta_D, pair_ND, seq, t, L, A2_ND, HAS_SEQ: tl.constexpr):
    """The state after token t, given the one before it, and the token's decay."""
    starts = starts_document(seq, t, L, HAS_SEQ)
    a_ND = decay(delta_D, A2_ND, starts, HAS_SEQ)
    b_ND, _ = split_pair(pair_ND)
    return a_ND * h_ND + b_ND * (delta_D * u_D.to(tl.float32))[None, :], a_ND


@triton.jit
def token_gradients(
    carry_ND, before_ND, after_ND, factor_ND, A2_ND, pair_ND, input_D, step_D, up_D,
    ASSEMBLY: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One token, given the states before and after it and the adjoint of the latter.

    Returns the adjoint of the state before it, the gradient of its exponent, that of delta * u,
    of delta by way of the exponent, and the sums over channels for B and C.
    """
    b_ND, c_ND = split_pair(pair_ND)
    g_ND = carry_ND + c_ND * up_D[None, :]
    dx_D = tl.sum(g_ND * b_ND, 0)
    carry_ND = g_ND * factor_ND
    dexponent_ND = carry_ND * before_ND
    dstep_D = tl.sum(dexponent_ND * A2_ND, 0) * LN_2
    sums = sum_channels(g_ND, step_D * input_D, after_ND, up_D, ASSEMBLY, EXACT)
    return carry_ND, dexponent_ND, dx_D, dstep_D, sums


@triton.jit
def store_totals(
    totals, dinitial, dA_ND, dD_D, dbias_D, carry_ND, batch, s, S, n_N, d_D,
    mask_ND, mask_D, zero, D_SIZE: tl.constexpr, N_SIZE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """Write what a program has summed over its tokens."""
    row_ND = state_at(batch * S + s, n_N, d_D, N_SIZE + 2, D_SIZE, zero)
    tl.store(totals + row_ND, dA_ND, mask=mask_ND)
    row_D = ((batch * S + s) * (N_SIZE + 2) + N_SIZE) * D_SIZE + d_D
    tl.store(totals + row_D, dD_D, mask=mask_D)
    tl.store(totals + row_D + D_SIZE, dbias_D, mask=mask_D)
    if HAS_INITIAL:  # noqa: SIM102
        if s == 0:
            initial_ND = state_at(batch, n_N, d_D, N_SIZE, D_SIZE, zero)
            tl.store(dinitial + initial_ND, carry_ND, mask=mask_ND)


@triton.jit(do_not_specialize=["zero"])
def scan_backward(
    dy, dfinal, u, delta, A, packed, D, bias, seq, checkpoints, local, decays,
    du, ddelta, dinitial, totals, partial,
    dy_b, u_b, delta_b, seq_b, L, segment, S, K, zero,
    DY_ROW: tl.constexpr, U_ROW: tl.constexpr, DELTA_ROW: tl.constexpr,
    D_SIZE: tl.constexpr, N_SIZE: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_DFINAL: tl.constexpr,
    SOFTPLUS: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr, ASSEMBLY: tl.constexpr,
    EXACT: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Every gradient: whole for u, delta and the initial state, partial sums for the others."""
    ALL: tl.constexpr = EVEN and N == N_SIZE
    batch, s = tl.program_id(1).to(tl.int64), tl.program_id(2)
    block = tl.program_id(0)
    d_D, n_N = block * BD + tl.arange(0, BD), tl.arange(0, N)
    mask_D = d_D < D_SIZE
    mask_ND = (n_N < N_SIZE)[:, None] & mask_D[None, :]
    A2_ND = load_state_matrix(A, d_D, n_N, D_SIZE, N_SIZE, zero)
    bias_D = load_channel(bias, d_D, mask_D, HAS_BIAS)
    skip_D = load_channel(D, d_D, mask_D, HAS_D)
    if HAS_SEQ:
        seq += batch * seq_b
    carry_ND = tl.zeros((N, BD), tl.float32)
    if HAS_DFINAL:
        end_ND = state_at(batch, n_N, d_D, N_SIZE, D_SIZE, zero)
        carry_ND = tl.load(dfinal + end_ND, mask=mask_ND, other=0.0)
    if S > 1:
        carry_ND = combine_segments(
            carry_ND, local, decays, S - 1, s, batch * S, d_D, n_N, mask_D, D_SIZE, zero, -1, N
        )
    dA_ND = tl.zeros((N, BD), tl.float32)
    dD_D = tl.zeros((BD,), tl.float32)
    dbias_D = tl.zeros((BD,), tl.float32)
    first = s * segment
    chunk = first + (tl.cdiv(tl.minimum(first + segment, L) - first, CHUNK) - 1) * CHUNK
    # Addresses of the token or chunk at hand, all of which go down together.
    u_D = u + (batch * u_b + chunk.to(tl.int64) * U_ROW) + d_D
    delta_D = delta + (batch * delta_b + chunk.to(tl.int64) * DELTA_ROW) + d_D
    dy_D = dy + (batch * dy_b + chunk.to(tl.int64) * DY_ROW) + d_D
    du_D = du + (batch * L + chunk) * D_SIZE + d_D
    ddelta_D = ddelta + (batch * L + chunk) * D_SIZE + d_D
    row = packed + (batch * L + chunk) * N
    rows = tl.num_programs(1).to(tl.int64) * L
    partial += (block * rows + batch * L + chunk) * (2 * N)
    place_ND = places_of_sums(N, BD, zero)
    kept_D = checkpoints + (batch * K + chunk // CHUNK) * (N_SIZE * D_SIZE) + d_D + zero
    us = load_tokens(u_D, U_ROW, chunk, L, mask_D, CHUNK, WHOLE, EVEN)
    raw = load_tokens(delta_D, DELTA_ROW, chunk, L, mask_D, CHUNK, WHOLE, EVEN)
    dys = load_tokens(dy_D, DY_ROW, chunk, L, mask_D, CHUNK, WHOLE, EVEN)
    start_ND = load_state(kept_D, n_N, mask_ND, D_SIZE, ALL)
    pair_ND = load_row(row + (CHUNK - 1) * N, N, BD)
    while chunk >= first:
        deltas, slopes = step_sizes(raw, bias_D, chunk, L, CHUNK, SOFTPLUS, WHOLE, ASSEMBLY)
        for j in tl.static_range(CHUNK - 1, -1, -1):
            if j == CHUNK // 4:
                # Not sooner, registers are few; not later, it takes some tokens' time.
                hop = tl.where(chunk > first, CHUNK, 0)
                u_D -= hop * U_ROW
                delta_D -= hop * DELTA_ROW
                dy_D -= hop * DY_ROW
                next_us = load_tokens(u_D, U_ROW, chunk - hop, L, mask_D, CHUNK, WHOLE, EVEN)
                next_raw = load_tokens(
                    delta_D, DELTA_ROW, chunk - hop, L, mask_D, CHUNK, WHOLE, EVEN
                )
                next_dys = load_tokens(dy_D, DY_ROW, chunk - hop, L, mask_D, CHUNK, WHOLE, EVEN)
                kept_D -= tl.where(chunk > first, N_SIZE * D_SIZE, 0)
                next_start_ND = load_state(kept_D, n_N, mask_ND, D_SIZE, ALL)
            before_ND = start_ND.to(tl.float32)
            for i in tl.static_range(j):
                passed_ND = load_row(row + i * N, N, BD)
                before_ND, _ = advance(
                    before_ND, us[i], deltas[i], passed_ND, seq, chunk + i, L, A2_ND, HAS_SEQ
                )
            after_ND, factor_ND = advance(
                before_ND, us[j], deltas[j], pair_ND, seq, chunk + j, L, A2_ND, HAS_SEQ
            )
            # A token ahead: the arithmetic of this one hides how long it takes.
            if j > 0:
                next_pair_ND = load_row(row + (j - 1) * N, N, BD)
            else:
                next_pair_ND = load_row(row + (CHUNK - 1 - hop) * N, N, BD)
            input_D, up_D = us[j].to(tl.float32), dys[j].to(tl.float32)
            carry_ND, dexponent_ND, dx_D, draw_D, sums_ND = token_gradients(
                *(carry_ND, before_ND, after_ND, factor_ND, A2_ND, pair_ND),
                *(input_D, deltas[j], up_D, ASSEMBLY, EXACT),
            )
            dA_ND += dexponent_ND * deltas[j][None, :]
            draw_D = (draw_D + input_D * dx_D) * slopes[j]
            dbias_D += draw_D
            dD_D += up_D * input_D
            dinput_D = deltas[j] * dx_D + skip_D * up_D
            inside = chunk + j < L
            store_sums(partial + j * (2 * N), place_ND, sums_ND, inside, N, WHOLE, ASSEMBLY)
            store_token(du_D + j * D_SIZE, dinput_D, chunk + j, L, mask_D, WHOLE, EVEN)
            store_token(ddelta_D + j * D_SIZE, draw_D, chunk + j, L, mask_D, WHOLE, EVEN)
            pair_ND = next_pair_ND
        us, raw, dys, start_ND = next_us, next_raw, next_dys, next_start_ND
        du_D -= CHUNK * D_SIZE
        ddelta_D -= CHUNK * D_SIZE
        row -= CHUNK * N
        partial -= CHUNK * (2 * N)
        chunk -= CHUNK
    store_totals(
        *(totals, dinitial, dA_ND, dD_D, dbias_D, carry_ND, batch, s, S, n_N, d_D),
        *(mask_ND, mask_D, zero, D_SIZE, N_SIZE, HAS_INITIAL),
    )
