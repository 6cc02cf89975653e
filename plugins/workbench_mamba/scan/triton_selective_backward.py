# mypy: ignore-errors
"""Triton kernels of the selective scan's backward pass.

A program is one warp, two lanes a channel: each has half its states, and sums over channels stay
in the warp. It goes through its tokens from the last to the first, a chunk of PARTS * T at a time:
from the checkpoint it finds the state before the last T tokens, whose states and decays it
computes again into registers, then their gradients; then alike for the T tokens before them. The
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
    load_pair,
    load_state_matrix,
    load_tokens,
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
    EVEN: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """What every segment but the first hands to the left from a zero adjoint, and its decay."""
    batch, s = tl.program_id(1).to(tl.int64), tl.program_id(2) + 1
    d_D, n_N = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, N)
    mask_D = d_D < D_SIZE
    A2_ND = load_state_matrix(A, d_D, n_N, D_SIZE, N_SIZE, zero)
    bias_D = load_channel(bias, d_D, mask_D, HAS_BIAS)
    first = s * segment
    t = first + (tl.cdiv(tl.minimum(first + segment, L) - first, T) - 1) * T
    dy_D = dy + (batch * dy_b + t * DY_ROW) + d_D
    delta_D = delta + (batch * delta_b + t * DELTA_ROW) + d_D
    row = packed + (batch * L + t) * N
    if HAS_SEQ:
        seq += batch * seq_b
    carry_ND = tl.zeros((N, BD), tl.float32)
    total_D = tl.zeros((BD,), tl.float32)
    kept = 1.0
    dys = load_tokens(dy_D, DY_ROW, t, L, mask_D, T, WHOLE, EVEN)
    raw = load_tokens(delta_D, DELTA_ROW, t, L, mask_D, T, WHOLE, EVEN)
    while t >= first:
        hop = tl.where(t > first, T, 0)
        dy_D -= hop * DY_ROW
        delta_D -= hop * DELTA_ROW
        next_dys = load_tokens(dy_D, DY_ROW, t - hop, L, mask_D, T, WHOLE, EVEN)
        next_raw = load_tokens(delta_D, DELTA_ROW, t - hop, L, mask_D, T, WHOLE, EVEN)
        deltas, _ = step_sizes(raw, bias_D, t, L, T, SOFTPLUS, WHOLE)
        for j in tl.static_range(T - 1, -1, -1):
            starts = starts_document(seq, t + j, L, HAS_SEQ)
            a_ND = decay(deltas[j], A2_ND, starts, HAS_SEQ)
            _, c_ND = load_pair(row + j * N, N, BD)
            carry_ND = a_ND * (carry_ND + c_ND * dys[j].to(tl.float32)[None, :])
            total_D += deltas[j]
            if HAS_SEQ:
                kept = tl.where(starts, 0.0, kept)
        dys, raw = next_dys, next_raw
        row -= hop * N
        t -= T
    store_segment(
        *(local, decays, carry_ND, total_D, kept, A2_ND, batch * S + s),
        *(n_N, d_D, mask_D, D_SIZE, zero, N),
    )


@triton.jit
def advance(
    h_ND, us, deltas, row, seq, chunk, L, A2_ND,
    HAS_SEQ: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, FIRST: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The states before T tokens from the chunk's FIRST on and after them, and their decays."""
    states, decays = (h_ND,), ()
    for j in tl.static_range(T):
        starts = starts_document(seq, chunk + FIRST + j, L, HAS_SEQ)
        a_ND = decay(deltas[FIRST + j], A2_ND, starts, HAS_SEQ)
        b_ND, _ = load_pair(row + (FIRST + j) * N, N, BD)
        x_D = deltas[FIRST + j] * us[FIRST + j].to(tl.float32)
        h_ND = a_ND * h_ND + b_ND * x_D[None, :]
        states = states + (h_ND,)  # noqa: RUF005
        decays = decays + (a_ND,)  # noqa: RUF005
    return states, decays


@triton.jit
def token_gradients(
    carry_ND, before_ND, after_ND, factor_ND, A2_ND, row, input_D, step_D, up_D,
    N: tl.constexpr, BD: tl.constexpr, ASSEMBLY: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One token, given the states before and after it and the adjoint of the latter.

    Returns the adjoint of the state before it, the gradient of its exponent, that of delta * u,
    of delta by way of the exponent, and the sums over channels for B and C.
    """
    b_ND, c_ND = load_pair(row, N, BD)
    g_ND = carry_ND + c_ND * up_D[None, :]
    dx_D = tl.sum(g_ND * b_ND, 0)
    carry_ND = g_ND * factor_ND
    dexponent_ND = carry_ND * before_ND
    dstep_D = tl.sum(dexponent_ND * A2_ND, 0) * LN_2
    sums = sum_channels(g_ND, step_D * input_D, after_ND, up_D, N, ASSEMBLY, EXACT)
    return carry_ND, dexponent_ND, dx_D, dstep_D, sums


@triton.jit
def store_totals(
    dA, dD, dbias, dinitial, dA_ND, dD_D, dbias_D, carry_ND, batch, s, S, n_N, d_D,
    mask_ND, mask_D, zero, D_SIZE: tl.constexpr, N_SIZE: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """Write what a program has summed over its tokens."""
    row_ND = state_at(batch * S + s, n_N, d_D, N_SIZE, D_SIZE, zero)
    tl.store(dA + row_ND, dA_ND, mask=mask_ND)
    row_D = (batch * S + s) * D_SIZE + d_D
    if HAS_D:
        tl.store(dD + row_D, dD_D, mask=mask_D)
    if HAS_BIAS:
        tl.store(dbias + row_D, dbias_D, mask=mask_D)
    if HAS_INITIAL:  # noqa: SIM102
        if s == 0:
            initial_ND = state_at(batch, n_N, d_D, N_SIZE, D_SIZE, zero)
            tl.store(dinitial + initial_ND, carry_ND, mask=mask_ND)


@triton.jit(do_not_specialize=["zero"])
def scan_backward(
    dy, dfinal, u, delta, A, packed, D, bias, seq, checkpoints, local, decays,
    du, ddelta, dinitial, dA, dD, dbias, partial,
    dy_b, u_b, delta_b, seq_b, L, segment, S, K, zero,
    DY_ROW: tl.constexpr, U_ROW: tl.constexpr, DELTA_ROW: tl.constexpr,
    D_SIZE: tl.constexpr, N_SIZE: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_DFINAL: tl.constexpr,
    SOFTPLUS: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr, ASSEMBLY: tl.constexpr,
    EXACT: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, T: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Every gradient: whole for u, delta and the initial state, partial sums for the others."""
    CHUNK: tl.constexpr = PARTS * T
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
    u_D = u + (batch * u_b + chunk * U_ROW) + d_D
    delta_D = delta + (batch * delta_b + chunk * DELTA_ROW) + d_D
    dy_D = dy + (batch * dy_b + chunk * DY_ROW) + d_D
    du_D = du + (batch * L + chunk) * D_SIZE + d_D
    ddelta_D = ddelta + (batch * L + chunk) * D_SIZE + d_D
    row = packed + (batch * L + chunk) * N
    rows = tl.num_programs(1).to(tl.int64) * L
    partial += (block * rows + batch * L + chunk) * (2 * N)
    place_ND = places_of_sums(N, BD, zero)
    kept_ND = checkpoints + state_at(batch * K + chunk // CHUNK, n_N, d_D, N_SIZE, D_SIZE, zero)
    us = load_tokens(u_D, U_ROW, chunk, L, mask_D, CHUNK, WHOLE, EVEN)
    raw = load_tokens(delta_D, DELTA_ROW, chunk, L, mask_D, CHUNK, WHOLE, EVEN)
    dys = load_tokens(dy_D, DY_ROW, chunk, L, mask_D, CHUNK, WHOLE, EVEN)
    start_ND = tl.load(kept_ND, mask=mask_ND, other=0.0)
    while chunk >= first:
        deltas, slopes = step_sizes(raw, bias_D, chunk, L, CHUNK, SOFTPLUS, WHOLE)
        for part in tl.static_range(PARTS - 1, -1, -1):
            h_ND = start_ND.to(tl.float32)
            if part == 0:
                # Not sooner: registers are few.
                hop = tl.where(chunk > first, CHUNK, 0)
                u_D -= hop * U_ROW
                delta_D -= hop * DELTA_ROW
                dy_D -= hop * DY_ROW
                next_us = load_tokens(u_D, U_ROW, chunk - hop, L, mask_D, CHUNK, WHOLE, EVEN)
                next_raw = load_tokens(
                    delta_D, DELTA_ROW, chunk - hop, L, mask_D, CHUNK, WHOLE, EVEN
                )
                next_dys = load_tokens(dy_D, DY_ROW, chunk - hop, L, mask_D, CHUNK, WHOLE, EVEN)
                kept_ND -= tl.where(chunk > first, N_SIZE * D_SIZE, 0)
                next_start_ND = tl.load(kept_ND, mask=mask_ND, other=0.0)
            for before in tl.static_range(part):
                passed, _ = advance(
                    h_ND, us, deltas, row, seq, chunk, L, A2_ND, HAS_SEQ, N, BD, before * T, T
                )
                h_ND = passed[T]
            states, factors = advance(
                h_ND, us, deltas, row, seq, chunk, L, A2_ND, HAS_SEQ, N, BD, part * T, T
            )
            # Stores come after all tokens: no load could pass one, nor the next token's arithmetic.
            sums, dinputs, draws = (), (), ()
            for j in tl.static_range(T - 1, -1, -1):
                i = part * T + j
                input_D = us[part * T + j].to(tl.float32)
                step_D, up_D = deltas[part * T + j], dys[part * T + j].to(tl.float32)
                carry_ND, dexponent_ND, dx_D, draw_D, sums_ND = token_gradients(
                    *(carry_ND, states[j], states[j + 1], factors[j], A2_ND, row + i * N),
                    *(input_D, step_D, up_D, N, BD, ASSEMBLY, EXACT),
                )
                dA_ND += dexponent_ND * step_D[None, :]
                draw_D = (draw_D + input_D * dx_D) * slopes[part * T + j]
                dbias_D += draw_D
                dD_D += up_D * input_D
                sums = sums + (sums_ND,)  # noqa: RUF005
                dinputs = dinputs + (step_D * dx_D + skip_D * up_D,)  # noqa: RUF005
                draws = draws + (draw_D,)  # noqa: RUF005
            for j in tl.static_range(T - 1, -1, -1):
                i = part * T + j
                sums_ND, dinput_D, draw_D = sums[T - 1 - j], dinputs[T - 1 - j], draws[T - 1 - j]
                inside = chunk + i < L
                store_sums(partial + i * (2 * N), place_ND, sums_ND, inside, N, WHOLE, ASSEMBLY)
                store_token(du_D + i * D_SIZE, dinput_D, chunk + i, L, mask_D, WHOLE, EVEN)
                store_token(ddelta_D + i * D_SIZE, draw_D, chunk + i, L, mask_D, WHOLE, EVEN)
        us, raw, dys, start_ND = next_us, next_raw, next_dys, next_start_ND
        du_D -= CHUNK * D_SIZE
        ddelta_D -= CHUNK * D_SIZE
        row -= CHUNK * N
        partial -= CHUNK * (2 * N)
        chunk -= CHUNK
    store_totals(
        *(dA, dD, dbias, dinitial, dA_ND, dD_D, dbias_D, carry_ND, batch, s, S, n_N, d_D),
        *(mask_ND, mask_D, zero, D_SIZE, N_SIZE, HAS_D, HAS_BIAS, HAS_INITIAL),
    )
