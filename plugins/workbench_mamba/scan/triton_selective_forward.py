# mypy: ignore-errors
"""Triton kernels of the selective scan's forward pass.

One program is one warp: 32 channels of one sequence, one a thread, with the N states of its
channel in registers, so that sums over n need no communication. Time runs in a loop, T steps at
a time, whose inputs are fetched T steps ahead. If there are too few channels to fill the device,
time is cut into segments as well: `segment_states` finds what each adds to a zero state.

Legend for shapes: B batch, L length, D channels, N state, S segments, K chunks.
"""

import triton
import triton.language as tl

from .triton_selective_steps import (
    combine_segments,
    decay,
    load_channel,
    load_row,
    load_rows,
    load_state_matrix,
    load_steps,
    sigmoid,
    starts_document,
    state_at,
    step_sizes,
)


@triton.jit
def pack_projections(
    B, C, packed, b_b, b_t, b_n, c_b, c_t, c_n, L, rows, N_SIZE, N: tl.constexpr, R: tl.constexpr
):
    """B and C as float32 `[B * L, 2, N]`, padded with zeros: aligned, for wide loads."""
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    n_N = tl.arange(0, N)
    batch_R, t_R = (row_R // L).to(tl.int64), row_R % L
    inside_R = row_R < rows
    mask_RN = inside_R[:, None] & (n_N < N_SIZE)[None, :]
    b_RN = (batch_R * b_b + t_R * b_t)[:, None] + n_N[None, :] * b_n
    c_RN = (batch_R * c_b + t_R * c_t)[:, None] + n_N[None, :] * c_n
    out_RN = packed + row_R.to(tl.int64)[:, None] * (2 * N) + n_N[None, :]
    b_RN = tl.load(B + b_RN, mask=mask_RN, other=0.0).to(tl.float32)
    c_RN = tl.load(C + c_RN, mask=mask_RN, other=0.0).to(tl.float32)
    tl.store(out_RN, b_RN, mask=inside_R[:, None])
    tl.store(out_RN + N, c_RN, mask=inside_R[:, None])


@triton.jit(do_not_specialize=["zero"])
def segment_states(
    u,
    delta,
    A,
    packed,
    bias,
    seq,
    local,
    decays,
    u_b,
    u_t,
    delta_b,
    delta_t,
    seq_b,
    L,
    D_SIZE,
    N_SIZE,
    S,
    segment,
    zero,
    HAS_BIAS: tl.constexpr,
    HAS_SEQ: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    N: tl.constexpr,
    BD: tl.constexpr,
    T: tl.constexpr,
):
    """What every segment but the last ends with from a zero state, and its total decay.

    Segments are whole: their length divides by T.
    """
    batch, s = tl.program_id(1).to(tl.int64), tl.program_id(2)
    d_D, n_N = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, N)
    mask_D = d_D < D_SIZE
    A2_ND = load_state_matrix(A, d_D, n_N, D_SIZE, N_SIZE, zero)
    bias_D = load_channel(bias, d_D, mask_D, HAS_BIAS)
    u += batch * u_b
    delta += batch * delta_b
    seq += batch * seq_b
    packed += batch * L * (2 * N)
    h_ND = tl.zeros((N, BD), tl.float32)
    total_D = tl.zeros((BD,), tl.float32)
    kept = 1.0
    first = s * segment
    last = first + segment
    us = load_steps(u, u_t, first, L, d_D, mask_D, T, True)
    raw = load_steps(delta, delta_t, first, L, d_D, mask_D, T, True)
    bs = load_rows(packed, first, L, N, BD, T)
    second = tl.minimum(first + T, last - T)
    next_us = load_steps(u, u_t, second, L, d_D, mask_D, T, True)
    next_raw = load_steps(delta, delta_t, second, L, d_D, mask_D, T, True)
    t = first
    while t < last:
        next_bs = ()
        third = tl.minimum(t + 2 * T, last - T)
        third_us = load_steps(u, u_t, third, L, d_D, mask_D, T, True)
        third_raw = load_steps(delta, delta_t, third, L, d_D, mask_D, T, True)
        deltas = step_sizes(raw, bias_D, t, L, T, SOFTPLUS, True)
        for j in tl.static_range(T):
            starts = starts_document(seq, t + j, L, HAS_SEQ)
            a_ND = decay(deltas[j], A2_ND, starts, HAS_SEQ)
            h_ND = a_ND * h_ND + bs[j] * (deltas[j] * us[j].to(tl.float32))[None, :]
            next_bs += (load_row(packed, t + T + j, L, N, BD),)
            total_D += deltas[j]
            if HAS_SEQ:
                kept = tl.where(starts, 0.0, kept)
        us, raw, bs = next_us, next_raw, next_bs
        next_us, next_raw = third_us, third_raw
        t += T
    at_ND = state_at(batch * S + s, n_N, d_D, N, D_SIZE, zero)
    tl.store(local + at_ND, h_ND, mask=mask_D[None, :])
    tl.store(decays + at_ND, tl.exp2(total_D[None, :] * A2_ND) * kept, mask=mask_D[None, :])


@triton.jit(do_not_specialize=["zero"])
def scan_forward(
    u,
    delta,
    A,
    packed,
    D,
    bias,
    z,
    initial,
    seq,
    y,
    final,
    checkpoints,
    local,
    decays,
    u_b,
    u_t,
    delta_b,
    delta_t,
    z_b,
    z_t,
    seq_b,
    L,
    D_SIZE,
    N_SIZE,
    S,
    segment,
    K,
    zero,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_SEQ: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    SAVE: tl.constexpr,
    WHOLE: tl.constexpr,
    N: tl.constexpr,
    BD: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Outputs, the final state and, if SAVE, the state before every CHUNK tokens."""
    batch, s = tl.program_id(1).to(tl.int64), tl.program_id(2)
    d_D, n_N = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, N)
    mask_D = d_D < D_SIZE
    mask_ND = (n_N < N_SIZE)[:, None] & mask_D[None, :]
    A2_ND = load_state_matrix(A, d_D, n_N, D_SIZE, N_SIZE, zero)
    bias_D = load_channel(bias, d_D, mask_D, HAS_BIAS)
    skip_D = load_channel(D, d_D, mask_D, HAS_D)
    u += batch * u_b
    delta += batch * delta_b
    z += batch * z_b
    seq += batch * seq_b
    y += batch * L * D_SIZE
    packed += batch * L * (2 * N)
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
    us = load_steps(u, u_t, first, L, d_D, mask_D, T, WHOLE)
    raw = load_steps(delta, delta_t, first, L, d_D, mask_D, T, WHOLE)
    if HAS_Z:
        zs = load_steps(z, z_t, first, L, d_D, mask_D, T, WHOLE)
    bs = load_rows(packed, first, L, N, BD, T)
    cs = load_rows(packed + N, first, L, N, BD, T)
    second = first + T
    if WHOLE:
        second = tl.minimum(second, L - T)
    next_us = load_steps(u, u_t, second, L, d_D, mask_D, T, WHOLE)
    next_raw = load_steps(delta, delta_t, second, L, d_D, mask_D, T, WHOLE)
    if HAS_Z:
        next_zs = load_steps(z, z_t, second, L, d_D, mask_D, T, WHOLE)
    t = first
    while t < last:
        third = t + 2 * T
        if WHOLE:
            third = tl.minimum(third, L - T)
        next_bs, next_cs = (), ()
        third_us = load_steps(u, u_t, third, L, d_D, mask_D, T, WHOLE)
        third_raw = load_steps(delta, delta_t, third, L, d_D, mask_D, T, WHOLE)
        if HAS_Z:
            third_zs = load_steps(z, z_t, third, L, d_D, mask_D, T, WHOLE)
        if SAVE:  # noqa: SIM102
            if t % CHUNK == 0:
                kept_ND = state_at(batch * K + t // CHUNK, n_N, d_D, N_SIZE, D_SIZE, zero)
                tl.store(checkpoints + kept_ND, h_ND, mask=mask_ND)
        deltas = step_sizes(raw, bias_D, t, L, T, SOFTPLUS, WHOLE)
        ys = ()
        for j in tl.static_range(T):
            starts = starts_document(seq, t + j, L, HAS_SEQ)
            a_ND = decay(deltas[j], A2_ND, starts, HAS_SEQ)
            u_D = us[j].to(tl.float32)
            h_ND = a_ND * h_ND + bs[j] * (deltas[j] * u_D)[None, :]
            y_D = tl.sum(cs[j] * h_ND, 0) + skip_D * u_D
            if HAS_Z:
                z_D = zs[j].to(tl.float32)
                y_D *= z_D * sigmoid(z_D)
            ys += (y_D,)
            # Here, where the registers of this step's rows are free again.
            next_bs += (load_row(packed, t + T + j, L, N, BD),)
            next_cs += (load_row(packed + N, t + T + j, L, N, BD),)
        for j in tl.static_range(T):
            keep_D = mask_D
            if not WHOLE:
                keep_D = mask_D & (t + j < L)
            tl.store(y + (t + j) * D_SIZE + d_D, ys[j].to(y.dtype.element_ty), mask=keep_D)
        us, raw, bs, cs = next_us, next_raw, next_bs, next_cs
        next_us, next_raw = third_us, third_raw
        if HAS_Z:
            zs, next_zs = next_zs, third_zs
        t += T
    if s == S - 1:
        final_ND = state_at(batch, n_N, d_D, N_SIZE, D_SIZE, zero)
        tl.store(final + final_ND, h_ND, mask=mask_ND)
