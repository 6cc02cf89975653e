# mypy: ignore-errors
"""Triton kernels of the selective scan's backward pass.

Programs are the forward pass's: one warp, 32 channels. Each goes through its tokens from the last
to the first, CHUNK at a time: from the checkpoint it recomputes the state before every T tokens
into a scratch buffer (which the nearest caches hold), then goes back through these, recomputing
the T states into registers. The sums over channels, for the gradients of B and C, are the costly
part: a warp reduces the 2 N products of a token by exchanging halves, so that every round halves
what is left, and writes one partial sum a block of channels.

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
    load_state_matrix,
    load_steps,
    sigmoid,
    starts_document,
    state_at,
    step_sizes,
)
from .triton_selective_sums import store_sums, sum_channels


@triton.jit
def store_steps(pointer, rows, t, last, stride, d_D, mask_D, T: tl.constexpr, WHOLE: tl.constexpr):
    """Store T rows given from the last to the first."""
    for j in tl.static_range(T):
        keep_D = mask_D
        if not WHOLE:
            keep_D = mask_D & (t + j < last)
        value_D = rows[T - 1 - j].to(pointer.dtype.element_ty)
        tl.store(pointer + (t + j) * stride + d_D, value_D, mask=keep_D)


@triton.jit
def gate(dy_D, z_D, HAS_Z: tl.constexpr):
    """The gradient of the output before the gate."""
    if HAS_Z:
        dy_D *= z_D * sigmoid(z_D)
    return dy_D


@triton.jit(do_not_specialize=["zero"])
def segment_adjoints(
    dy,
    delta,
    A,
    packed,
    bias,
    z,
    seq,
    local,
    decays,
    dy_b,
    dy_t,
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
    zero,
    HAS_BIAS: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_SEQ: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    WHOLE: tl.constexpr,
    N: tl.constexpr,
    BD: tl.constexpr,
    T: tl.constexpr,
):
    """What every segment but the first hands to the left from a zero adjoint, and its decay."""
    batch, s = tl.program_id(1).to(tl.int64), tl.program_id(2) + 1
    d_D, n_N = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, N)
    mask_D = d_D < D_SIZE
    A2_ND = load_state_matrix(A, d_D, n_N, D_SIZE, N_SIZE, zero)
    bias_D = load_channel(bias, d_D, mask_D, HAS_BIAS)
    dy += batch * dy_b
    delta += batch * delta_b
    z += batch * z_b
    seq += batch * seq_b
    packed += batch * L * (2 * N)
    carry_ND = tl.zeros((N, BD), tl.float32)
    total_D = tl.zeros((BD,), tl.float32)
    kept = 1.0
    first = s * segment
    steps = tl.cdiv(tl.minimum(first + segment, L) - first, T)
    t = first + (steps - 1) * T
    cs = load_rows(packed + N, t, L, N, BD, T)
    dys = load_steps(dy, dy_t, t, L, d_D, mask_D, T, WHOLE)
    raw = load_steps(delta, delta_t, t, L, d_D, mask_D, T, WHOLE)
    second = tl.maximum(t - T, first)
    next_dys = load_steps(dy, dy_t, second, L, d_D, mask_D, T, WHOLE)
    next_raw = load_steps(delta, delta_t, second, L, d_D, mask_D, T, WHOLE)
    if HAS_Z:
        zs = load_steps(z, z_t, t, L, d_D, mask_D, T, WHOLE)
        next_zs = load_steps(z, z_t, second, L, d_D, mask_D, T, WHOLE)
    while t >= first:
        third = tl.maximum(t - 2 * T, first)
        third_dys = load_steps(dy, dy_t, third, L, d_D, mask_D, T, WHOLE)
        third_raw = load_steps(delta, delta_t, third, L, d_D, mask_D, T, WHOLE)
        if HAS_Z:
            third_zs = load_steps(z, z_t, third, L, d_D, mask_D, T, WHOLE)
        next_cs = ()
        deltas = step_sizes(raw, bias_D, t, L, T, SOFTPLUS, WHOLE)
        for j in tl.static_range(T - 1, -1, -1):
            starts = starts_document(seq, t + j, L, HAS_SEQ)
            a_ND = decay(deltas[j], A2_ND, starts, HAS_SEQ)
            dy_D = dys[j].to(tl.float32)
            if HAS_Z:
                dy_D = gate(dy_D, zs[j].to(tl.float32), HAS_Z)
            carry_ND = a_ND * (carry_ND + cs[j] * dy_D[None, :])
            next_cs = (load_row(packed + N, tl.maximum(t - T + j, 0), L, N, BD),) + next_cs  # noqa: RUF005
            total_D += deltas[j]
            if HAS_SEQ:
                kept = tl.where(starts, 0.0, kept)
        dys, raw, cs = next_dys, next_raw, next_cs
        next_dys, next_raw = third_dys, third_raw
        if HAS_Z:
            zs, next_zs = next_zs, third_zs
        t -= T
    at_ND = state_at(batch * S + s, n_N, d_D, N, D_SIZE, zero)
    tl.store(local + at_ND, carry_ND, mask=mask_D[None, :])
    tl.store(decays + at_ND, tl.exp2(total_D[None, :] * A2_ND) * kept, mask=mask_D[None, :])


@triton.jit
def recompute_starts(
    h_ND,
    u,
    delta,
    packed,
    seq,
    scratch,
    A2_ND,
    bias_D,
    u_t,
    delta_t,
    t,
    L,
    zero,
    d_D,
    n_N,
    mask_D,
    HAS_SEQ: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    WHOLE: tl.constexpr,
    N: tl.constexpr,
    BD: tl.constexpr,
    T: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Write the states before t, t + T, ... to scratch, `[PARTS, N, BD]`, from the one at t."""
    lane_D = tl.arange(0, BD)
    us = load_steps(u, u_t, t, L, d_D, mask_D, T, WHOLE)
    raw = load_steps(delta, delta_t, t, L, d_D, mask_D, T, WHOLE)
    at_ND = n_N[:, None] * BD + lane_D[None, :] + zero
    tl.store(scratch + at_ND, h_ND)
    bs = load_rows(packed, t, L, N, BD, T)
    next_us = load_steps(u, u_t, t + T, L, d_D, mask_D, T, WHOLE)
    next_raw = load_steps(delta, delta_t, t + T, L, d_D, mask_D, T, WHOLE)
    end = t + (PARTS - 1) * T
    for part in range(1, PARTS):
        third = tl.minimum(t + 2 * T, end)
        third_us = load_steps(u, u_t, third, L, d_D, mask_D, T, WHOLE)
        third_raw = load_steps(delta, delta_t, third, L, d_D, mask_D, T, WHOLE)
        next_bs = ()
        deltas = step_sizes(raw, bias_D, t, L, T, SOFTPLUS, WHOLE)
        for j in tl.static_range(T):
            starts = starts_document(seq, t + j, L, HAS_SEQ)
            a_ND = decay(deltas[j], A2_ND, starts, HAS_SEQ)
            h_ND = a_ND * h_ND + bs[j] * (deltas[j] * us[j].to(tl.float32))[None, :]
            next_bs += (load_row(packed, t + T + j, L, N, BD),)
        tl.store(scratch + part * (N * BD) + at_ND, h_ND)
        us, raw, bs = next_us, next_raw, next_bs
        next_us, next_raw = third_us, third_raw
        t += T


@triton.jit(do_not_specialize=["zero"])
def scan_backward(
    dy,
    dfinal,
    u,
    delta,
    A,
    packed,
    D,
    bias,
    z,
    seq,
    checkpoints,
    scratch,
    local,
    decays,
    du,
    ddelta,
    dz,
    dinitial,
    dA,
    dD,
    dbias,
    partial,
    dy_b,
    dy_t,
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
    HAS_DFINAL: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    WHOLE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    EXACT: tl.constexpr,
    N: tl.constexpr,
    BD: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Every gradient: whole for u, delta, z and the initial state, partial sums for the others."""
    batch, s = tl.program_id(1).to(tl.int64), tl.program_id(2)
    block = tl.program_id(0)
    d_D, n_N = block * BD + tl.arange(0, BD), tl.arange(0, N)
    mask_D = d_D < D_SIZE
    mask_ND = (n_N < N_SIZE)[:, None] & mask_D[None, :]
    A2_ND = load_state_matrix(A, d_D, n_N, D_SIZE, N_SIZE, zero)
    bias_D = load_channel(bias, d_D, mask_D, HAS_BIAS)
    skip_D = load_channel(D, d_D, mask_D, HAS_D)
    dy += batch * dy_b
    u += batch * u_b
    delta += batch * delta_b
    z += batch * z_b
    seq += batch * seq_b
    du += batch * L * D_SIZE
    ddelta += batch * L * D_SIZE
    dz += batch * L * D_SIZE
    packed += batch * L * (2 * N)
    rows = tl.num_programs(1).to(tl.int64) * L
    if ASSEMBLY:
        block *= BD // 32
    partial += (block * rows + batch * L) * (2 * N)
    PARTS: tl.constexpr = CHUNK // T
    program = (batch * S + s) * tl.num_programs(0) + tl.program_id(0)
    scratch += program * (PARTS * N * BD)
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
    scratch_ND = n_N[:, None] * BD + tl.arange(0, BD)[None, :] + zero
    first = s * segment
    last = tl.minimum(first + segment, L)
    chunk = first + (tl.cdiv(last - first, CHUNK) - 1) * CHUNK
    while chunk >= first:
        kept_ND = state_at(batch * K + chunk // CHUNK, n_N, d_D, N_SIZE, D_SIZE, zero)
        start_ND = tl.load(checkpoints + kept_ND, mask=mask_ND, other=0.0)
        recompute_starts(
            start_ND,
            u,
            delta,
            packed,
            seq,
            scratch,
            A2_ND,
            bias_D,
            u_t,
            delta_t,
            chunk,
            L,
            zero,
            d_D,
            n_N,
            mask_D,
            HAS_SEQ,
            SOFTPLUS,
            WHOLE,
            N,
            BD,
            T,
            PARTS,
        )
        t = chunk + CHUNK - T
        bs = load_rows(packed, t, L, N, BD, T)
        cs = load_rows(packed + N, t, L, N, BD, T)
        h_ND = tl.load(scratch + (PARTS - 1) * (N * BD) + scratch_ND)
        us = load_steps(u, u_t, t, L, d_D, mask_D, T, WHOLE)
        raw = load_steps(delta, delta_t, t, L, d_D, mask_D, T, WHOLE)
        dys = load_steps(dy, dy_t, t, L, d_D, mask_D, T, WHOLE)
        if HAS_Z:
            zs = load_steps(z, z_t, t, L, d_D, mask_D, T, WHOLE)
        for part in range(PARTS):
            following = tl.maximum(t - T, 0)
            next_us = load_steps(u, u_t, following, L, d_D, mask_D, T, WHOLE)
            next_raw = load_steps(delta, delta_t, following, L, d_D, mask_D, T, WHOLE)
            next_dys = load_steps(dy, dy_t, following, L, d_D, mask_D, T, WHOLE)
            if HAS_Z:
                next_zs = load_steps(z, z_t, following, L, d_D, mask_D, T, WHOLE)
            deltas = step_sizes(raw, bias_D, t, L, T, SOFTPLUS, WHOLE)
            hs = (h_ND,)
            decays_T = ()
            for j in tl.static_range(T):
                starts = starts_document(seq, t + j, L, HAS_SEQ)
                a_ND = decay(deltas[j], A2_ND, starts, HAS_SEQ)
                h_ND = a_ND * h_ND + bs[j] * (deltas[j] * us[j].to(tl.float32))[None, :]
                hs += (h_ND,)
                decays_T += (a_ND,)
            next_bs, next_cs = (), ()
            dus, ddeltas, dzs, sums = (), (), (), ()
            for j in tl.static_range(T - 1, -1, -1):
                u_D = us[j].to(tl.float32)
                dy_D = dys[j].to(tl.float32)
                if HAS_Z:
                    z_D = zs[j].to(tl.float32)
                    sigmoid_D = sigmoid(z_D)
                    y_D = tl.sum(cs[j] * hs[j + 1], 0) + skip_D * u_D
                    dzs += (dy_D * y_D * sigmoid_D * (1.0 + z_D * (1.0 - sigmoid_D)),)
                    dy_D *= z_D * sigmoid_D
                g_ND = carry_ND + cs[j] * dy_D[None, :]
                dx_D = tl.sum(g_ND * bs[j], 0)
                carry_ND = g_ND * decays_T[j]
                dexponent_ND = carry_ND * hs[j]
                ddelta_D = tl.sum(dexponent_ND * A2_ND, 0) * LN_2 + u_D * dx_D
                dA_ND += dexponent_ND * deltas[j][None, :]
                sums += (sum_channels(g_ND, deltas[j] * u_D, hs[j + 1], dy_D, N, ASSEMBLY, EXACT),)
                # Here, where the registers of this step's rows are free again.
                next_bs = (load_row(packed, following + j, L, N, BD),) + next_bs  # noqa: RUF005
                next_cs = (load_row(packed + N, following + j, L, N, BD),) + next_cs  # noqa: RUF005
                if j == T - 1:
                    below = tl.maximum(PARTS - 2 - part, 0)
                    h_ND = tl.load(scratch + below * (N * BD) + scratch_ND)
                if SOFTPLUS:
                    ddelta_D *= sigmoid(raw[j].to(tl.float32) + bias_D)
                if not WHOLE:
                    ddelta_D = tl.where(t + j < L, ddelta_D, 0.0)
                dbias_D += ddelta_D
                dD_D += dy_D * u_D
                dus += (deltas[j] * dx_D + skip_D * dy_D,)
                ddeltas += (ddelta_D,)
            store_steps(du, dus, t, L, D_SIZE, d_D, mask_D, T, WHOLE)
            store_steps(ddelta, ddeltas, t, L, D_SIZE, d_D, mask_D, T, WHOLE)
            if HAS_Z:
                store_steps(dz, dzs, t, L, D_SIZE, d_D, mask_D, T, WHOLE)
            for j in tl.static_range(T):
                store_sums(partial, sums[T - 1 - j], t + j, L, rows, N, BD, WHOLE, ASSEMBLY)
            us, raw, dys, bs, cs = next_us, next_raw, next_dys, next_bs, next_cs
            if HAS_Z:
                zs = next_zs
            t -= T
        chunk -= CHUNK
    row_ND = state_at(batch * S + s, n_N, d_D, N_SIZE, D_SIZE, zero)
    tl.store(dA + row_ND, dA_ND, mask=mask_ND)
    row_D = (batch * S + s) * D_SIZE + d_D
    if HAS_D:
        tl.store(dD + row_D, dD_D, mask=mask_D)
    if HAS_BIAS:
        tl.store(dbias + row_D, dbias_D, mask=mask_D)
    if HAS_INITIAL:  # noqa: SIM102
        if s == 0:
            start_ND = state_at(batch, n_N, d_D, N_SIZE, D_SIZE, zero)
            tl.store(dinitial + start_ND, carry_ND, mask=mask_ND)
