# mypy: ignore-errors
"""Triton kernels of the selective scan's forward pass.

A program is one warp, two lanes a channel of one sequence, each with half its N states in
registers. Time runs in a loop, CHUNK tokens at a time, whose inputs are fetched a body ahead. If
there are too few channels to fill the device, time is cut into segments as well: `segment_states`
finds what each adds to a zero state.

Legend for shapes: B batch, L length, D channels, N state, S segments, K chunks.
"""

import triton
import triton.language as tl

from .triton_selective_steps import (
    combine_segments,
    decay,
    load_channel,
    load_rows,
    load_state_matrix,
    load_tokens,
    sigmoid,
    split_pair,
    starts_document,
    state_at,
    step_sizes,
    store_segment,
    store_state,
    store_token,
)


@triton.jit
def pack_projections(
    B, C, packed, b_b, b_t, b_n, c_b, c_t, c_n, L, rows, padded, N_SIZE,
    N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """B and C as float32 in the halves of one 64-bit number, `[padded, N]`; zeros in the padding.

    The rows after the last token's are there to be read in vain.
    """
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    n_N = tl.arange(0, N)
    batch_R, t_R = (row_R // L).to(tl.int64), row_R % L
    mask_RN = (row_R < rows)[:, None] & (n_N < N_SIZE)[None, :]
    b_RN = (batch_R * b_b + t_R * b_t)[:, None] + n_N[None, :] * b_n
    c_RN = (batch_R * c_b + t_R * c_t)[:, None] + n_N[None, :] * c_n
    b_RN = tl.load(B + b_RN, mask=mask_RN, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
    c_RN = tl.load(C + c_RN, mask=mask_RN, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
    pair_RN = (c_RN.to(tl.int64) << 32) | (b_RN.to(tl.int64) & 0xFFFFFFFF)
    out_RN = packed + row_R.to(tl.int64)[:, None] * N + n_N[None, :]
    tl.store(out_RN, pair_RN, mask=(row_R < padded)[:, None])


@triton.jit(do_not_specialize=["zero"])
def segment_states(
    u, delta, A, packed, bias, seq, local, decays, u_b, delta_b, seq_b, L, segment, S, zero,
    U_ROW: tl.constexpr, DELTA_ROW: tl.constexpr, D_SIZE: tl.constexpr, N_SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr, SOFTPLUS: tl.constexpr, WHOLE: tl.constexpr,
    EVEN: tl.constexpr, ASSEMBLY: tl.constexpr, N: tl.constexpr, BD: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """What every segment but the last ends with from a zero state, and its total decay.

    Segments are whole: their length divides by CHUNK.
    """
    batch, s = tl.program_id(1).to(tl.int64), tl.program_id(2)
    d_D, n_N = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, N)
    mask_D = d_D < D_SIZE
    A2_ND = load_state_matrix(A, d_D, n_N, D_SIZE, N_SIZE, zero)
    bias_D = load_channel(bias, d_D, mask_D, HAS_BIAS)
    first = s * segment
    last = first + segment
    u_D = u + (batch * u_b + first.to(tl.int64) * U_ROW) + d_D
    delta_D = delta + (batch * delta_b + first.to(tl.int64) * DELTA_ROW) + d_D
    row = packed + (batch * L + first) * N
    if HAS_SEQ:
        seq += batch * seq_b
    h_ND = tl.zeros((N, BD), tl.float32)
    total_D = tl.zeros((BD,), tl.float32)
    kept = 1.0
    us = load_tokens(u_D, U_ROW, first, L, mask_D, CHUNK, True, EVEN)
    raw = load_tokens(delta_D, DELTA_ROW, first, L, mask_D, CHUNK, True, EVEN)
    pairs = load_rows(row, N, BD, CHUNK)
    for t in range(first, last, CHUNK):
        hop = tl.where(t + CHUNK < last, CHUNK, 0)
        u_D += hop * U_ROW
        delta_D += hop * DELTA_ROW
        next_us = load_tokens(u_D, U_ROW, t, L, mask_D, CHUNK, True, EVEN)
        next_raw = load_tokens(delta_D, DELTA_ROW, t, L, mask_D, CHUNK, True, EVEN)
        row += CHUNK * N
        next_pairs = load_rows(row, N, BD, CHUNK)
        deltas, _ = step_sizes(raw, bias_D, t, L, CHUNK, SOFTPLUS, True, ASSEMBLY)
        for j in tl.static_range(CHUNK):
            starts = starts_document(seq, t + j, L, HAS_SEQ)
            a_ND = decay(deltas[j], A2_ND, starts, HAS_SEQ)
            b_ND, _ = split_pair(pairs[j])
            h_ND = a_ND * h_ND + b_ND * (deltas[j] * us[j].to(tl.float32))[None, :]
            total_D += deltas[j]
            if HAS_SEQ:
                kept = tl.where(starts, 0.0, kept)
        us, raw, pairs = next_us, next_raw, next_pairs
    store_segment(
        local, decays, h_ND, total_D, kept, A2_ND, batch * S + s, n_N, d_D, mask_D, D_SIZE, zero, N
    )


@triton.jit(do_not_specialize=["zero"])
def scan_forward(
    u, delta, A, packed, D, bias, seq, initial, z, y, gated, final, checkpoints, local, decays,
    u_b, delta_b, z_b, seq_b, L, segment, S, K, zero,
    U_ROW: tl.constexpr, DELTA_ROW: tl.constexpr, Z_ROW: tl.constexpr,
    D_SIZE: tl.constexpr, N_SIZE: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_SEQ: tl.constexpr,
    SOFTPLUS: tl.constexpr, SAVE: tl.constexpr, PLAIN: tl.constexpr, WHOLE: tl.constexpr,
    EVEN: tl.constexpr, ASSEMBLY: tl.constexpr, N: tl.constexpr, BD: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Outputs (if PLAIN, before the gate), the final state and, if SAVE, the checkpoints."""
    batch, s = tl.program_id(1).to(tl.int64), tl.program_id(2)
    d_D, n_N = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, N)
    mask_D = d_D < D_SIZE
    mask_ND = (n_N < N_SIZE)[:, None] & mask_D[None, :]
    A2_ND = load_state_matrix(A, d_D, n_N, D_SIZE, N_SIZE, zero)
    bias_D = load_channel(bias, d_D, mask_D, HAS_BIAS)
    skip_D = load_channel(D, d_D, mask_D, HAS_D)
    if HAS_SEQ:
        seq += batch * seq_b
    h_ND = tl.zeros((N, BD), tl.float32)
    if HAS_INITIAL:
        row_ND = state_at(batch, n_N, d_D, N_SIZE, D_SIZE, zero)
        h_ND = tl.load(initial + row_ND, mask=mask_ND, other=0.0)
    if S > 1:
        h_ND = combine_segments(
            h_ND, local, decays, 0, s, batch * S, d_D, n_N, mask_D, D_SIZE, zero, 1, N
        )
    first = s * segment
    last = tl.minimum(first + segment, L)
    u_D = u + (batch * u_b + first.to(tl.int64) * U_ROW) + d_D
    delta_D = delta + (batch * delta_b + first.to(tl.int64) * DELTA_ROW) + d_D
    row = packed + (batch * L + first) * N
    here = (batch * L + first) * D_SIZE
    kept_D = checkpoints + (batch * K + first // CHUNK) * (N_SIZE * D_SIZE) + d_D + zero
    us = load_tokens(u_D, U_ROW, first, L, mask_D, CHUNK, WHOLE, EVEN)
    raw = load_tokens(delta_D, DELTA_ROW, first, L, mask_D, CHUNK, WHOLE, EVEN)
    pairs = load_rows(row, N, BD, CHUNK)
    if HAS_Z:
        z_D = z + (batch * z_b + first.to(tl.int64) * Z_ROW) + d_D
        gated_D = gated + here + d_D
        zs = load_tokens(z_D, Z_ROW, first, L, mask_D, CHUNK, WHOLE, EVEN)
    if PLAIN:
        y_D = y + here + d_D
    # The way from a projection to its step size is long: it is gone a body ahead of the rest.
    deltas, _ = step_sizes(raw, bias_D, first, L, CHUNK, SOFTPLUS, WHOLE, ASSEMBLY)
    delta_D += tl.where(first + CHUNK < last, CHUNK, 0) * DELTA_ROW
    raw = load_tokens(delta_D, DELTA_ROW, first + CHUNK, L, mask_D, CHUNK, WHOLE, EVEN)
    for t in range(first, last, CHUNK):
        if SAVE:
            store_state(kept_D, h_ND, n_N, mask_ND, D_SIZE, EVEN and N == N_SIZE)
            kept_D += N_SIZE * D_SIZE
        hop = tl.where(t + CHUNK < last, CHUNK, 0)
        u_D += hop * U_ROW
        delta_D += tl.where(t + 2 * CHUNK < last, CHUNK, 0) * DELTA_ROW
        next_us = load_tokens(u_D, U_ROW, t + CHUNK, L, mask_D, CHUNK, WHOLE, EVEN)
        next_raw = load_tokens(delta_D, DELTA_ROW, t + 2 * CHUNK, L, mask_D, CHUNK, WHOLE, EVEN)
        if HAS_Z:
            z_D += hop * Z_ROW
            next_zs = load_tokens(z_D, Z_ROW, t + CHUNK, L, mask_D, CHUNK, WHOLE, EVEN)
        next_pairs = load_rows(row + CHUNK * N, N, BD, CHUNK)
        # No store between the loads, and none before all sums: neither could pass it.
        next_deltas, _ = step_sizes(raw, bias_D, t + CHUNK, L, CHUNK, SOFTPLUS, WHOLE, ASSEMBLY)
        outs = ()
        for j in tl.static_range(CHUNK):
            starts = starts_document(seq, t + j, L, HAS_SEQ)
            a_ND = decay(deltas[j], A2_ND, starts, HAS_SEQ)
            b_ND, c_ND = split_pair(pairs[j])
            input_D = us[j].to(tl.float32)
            h_ND = a_ND * h_ND + b_ND * (deltas[j] * input_D)[None, :]
            outs = outs + (tl.sum(c_ND * h_ND, 0) + skip_D * input_D,)  # noqa: RUF005
        for j in tl.static_range(CHUNK):
            if PLAIN:
                store_token(y_D + j * D_SIZE, outs[j], t + j, L, mask_D, WHOLE, EVEN)
            if HAS_Z:
                gate_D = zs[j].to(tl.float32)
                gated_out_D = outs[j] * gate_D * sigmoid(gate_D, ASSEMBLY)
                store_token(gated_D + j * D_SIZE, gated_out_D, t + j, L, mask_D, WHOLE, EVEN)
        us, raw, pairs, deltas = next_us, next_raw, next_pairs, next_deltas
        row += CHUNK * N
        if PLAIN:
            y_D += CHUNK * D_SIZE
        if HAS_Z:
            zs = next_zs
            gated_D += CHUNK * D_SIZE
    if s == S - 1:
        final_ND = state_at(batch, n_N, d_D, N_SIZE, D_SIZE, zero)
        tl.store(final + final_ND, h_ND, mask=mask_ND)
