# mypy: ignore-errors
"""Triton functions that sum over channels, for the gradients of the selective scan's B and C.

Legend for shapes: B batch, L length, D channels, N state, P channel blocks, R rows, I both halves.
"""

import triton
import triton.language as tl

from .triton_selective_assembly import exchange_assembly, matrix_assembly

EXCHANGE = tl.constexpr(exchange_assembly())
MATRIX = tl.constexpr(matrix_assembly())
REGISTERS = tl.constexpr(",".join(["=f"] * 16 + ["f"] * 32))
# The matrix units cut the other bits off; this makes up for the mean of what is lost.
CUT = tl.constexpr(1.0 + 0.72 * 2.0**-11)


@triton.jit
def sum_channels(
    g_ND, x_D, h_ND, dy_D, N: tl.constexpr, ASSEMBLY: tl.constexpr, EXACT: tl.constexpr
):
    """The sums of g x and of h dy over the 32 channels of a warp, as `store_sums` takes them."""
    if ASSEMBLY:
        n_N = tl.arange(0, N)
        if EXACT:
            values = [g_ND * x_D[None, :], h_ND * dy_D[None, :]]
            sums_ND = tl.inline_asm_elementwise(
                EXCHANGE, REGISTERS, values, tl.float32, is_pure=True, pack=16
            )
        else:
            values = [g_ND * (x_D * CUT)[None, :], h_ND * (dy_D * CUT)[None, :]]
            sums_ND = tl.inline_asm_elementwise(
                MATRIX, REGISTERS, values, tl.float32, is_pure=True, pack=16
            )
        # As integers, because adding an integer zero is free.
        bits_ND = sums_ND.to(tl.int32, bitcast=True)
        sums = ()
        for group in tl.static_range(N // 16):
            bits_D = tl.sum(tl.where((n_N == 16 * group)[:, None], bits_ND, 0), 0)
            sums += (bits_D.to(tl.float32, bitcast=True),)
        return sums
    else:  # noqa: RET505 (chosen at compile time: the two branches' types differ)
        return (tl.sum(g_ND * x_D[None, :], 1), tl.sum(h_ND * dy_D[None, :], 1))


@triton.jit
def store_sums(
    partial,
    sums,
    t,
    last,
    rows,
    N: tl.constexpr,
    BD: tl.constexpr,
    WHOLE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Store one token's sums in its row of `[L, 2, N]`; that of each warp in its own block."""
    out = partial + t * (2 * N)
    inside = True
    if not WHOLE:
        inside = t < last
    if ASSEMBLY:
        thread_D = tl.arange(0, BD)
        lane_D = thread_D % 32
        out_D = out + (thread_D // 32) * rows * (2 * N) + (lane_D // 16) * N + lane_D % 16
        for group in tl.static_range(N // 16):
            tl.store(out_D + 16 * group, sums[group], mask=inside)
    else:
        n_N = tl.arange(0, N)
        tl.store(out + n_N, sums[0], mask=inside)
        tl.store(out + N + n_N, sums[1], mask=inside)


@triton.jit
def sum_blocks(
    partial, dB, dC, rows, N_SIZE, P, N: tl.constexpr, R: tl.constexpr, UNROLL: tl.constexpr
):
    """Add up the partial sums `[P, rows, 2, N]` of the channel blocks, in order."""
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    i_I = tl.arange(0, 2 * N)
    inside_R = row_R < rows
    at_RI = row_R.to(tl.int64)[:, None] * (2 * N) + i_I[None, :]
    total_RI = tl.zeros((R, 2 * N), tl.float32)
    p = 0
    while p < P:
        for k in tl.static_range(UNROLL):
            block_RI = partial + (tl.zeros((), tl.int64) + p + k) * rows * (2 * N) + at_RI
            total_RI += tl.load(block_RI, mask=inside_R[:, None] & (p + k < P), other=0.0)
        p += UNROLL
    n_I = i_I % N
    keep_RI = inside_R[:, None] & (n_I < N_SIZE)[None, :]
    out_RI = row_R.to(tl.int64)[:, None] * N_SIZE + n_I[None, :]
    is_B_I = i_I < N
    tl.store(dB + out_RI, total_RI.to(dB.dtype.element_ty), mask=keep_RI & is_B_I[None, :])
    tl.store(dC + out_RI, total_RI.to(dC.dtype.element_ty), mask=keep_RI & ~is_B_I[None, :])
