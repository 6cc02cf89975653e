# mypy: ignore-errors
"""Triton functions that sum over channels, for the gradients of the selective scan's B and C.

Legend for shapes: B batch, L length, D channels, N state, P channel blocks, R rows, I both halves.
"""

import triton
import triton.language as tl

from .triton_selective_assembly import exchange_assembly, matrix_assembly

EXCHANGE = tl.constexpr(exchange_assembly())
MATRIX = tl.constexpr(matrix_assembly())
REGISTERS = tl.constexpr(",".join(["=f"] * 8 + ["f"] * 16))
# The matrix units cut the other bits off; this makes up for the mean of what is lost.
CUT = tl.constexpr(1.0 + 0.72 * 2.0**-11)


@triton.jit
def sum_channels(g_ND, x_D, h_ND, dy_D, ASSEMBLY: tl.constexpr, EXACT: tl.constexpr):
    """The sums of g x and of h dy over the 16 channels of a warp, as `store_sums` takes them."""
    if ASSEMBLY:
        if EXACT:
            values = [g_ND * x_D[None, :], h_ND * dy_D[None, :]]
            return tl.inline_asm_elementwise(
                EXCHANGE, REGISTERS, values, tl.float32, is_pure=True, pack=8
            )
        values = [g_ND * (x_D * CUT)[None, :], h_ND * (dy_D * CUT)[None, :]]
        return tl.inline_asm_elementwise(
            MATRIX, REGISTERS, values, tl.float32, is_pure=True, pack=8
        )
    else:  # noqa: RET505 (chosen at compile time: the two branches' types differ)
        return (tl.sum(g_ND * x_D[None, :], 1), tl.sum(h_ND * dy_D[None, :], 1))


@triton.jit
def places_of_sums(N: tl.constexpr, BD: tl.constexpr, zero):
    """Where the results of assembly blocks go in a token's row of 2 N sums, one after the other.

    `zero` is for what `state_at` says: the results must be stored from where they are.
    """
    n_N, c_D = tl.arange(0, N), tl.arange(0, BD)
    return (n_N // 16 * 32 + n_N % 2 * 16)[:, None] + c_D[None, :] + zero


@triton.jit
def store_sums(
    out, place_ND, sums, inside, N: tl.constexpr, WHOLE: tl.constexpr, ASSEMBLY: tl.constexpr
):
    """Store one token's 2 N sums in the row at `out`, in the order that `sum_blocks` undoes."""
    if ASSEMBLY:
        keep_ND = ((tl.arange(0, N) % 16) < 2)[:, None]
        if not WHOLE:
            keep_ND = keep_ND & inside
        tl.store(out + place_ND, sums.to(out.dtype.element_ty), mask=keep_ND)
    else:
        n_N = tl.arange(0, N)
        place_N = n_N // 16 * 32 + n_N % 2 * 16 + n_N % 16 // 2
        tl.store(out + place_N, sums[0].to(out.dtype.element_ty), mask=inside)
        tl.store(out + place_N + 8, sums[1].to(out.dtype.element_ty), mask=inside)


@triton.jit
def sum_blocks(
    partial, dB, dC, b_row, c_row, rows, N_SIZE, P,
    N: tl.constexpr, R: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Add up the partial sums `[P, rows, 2 N]` of the channel blocks, in order."""
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    i_I = tl.arange(0, 2 * N)
    inside_R = row_R < rows
    at_RI = row_R.to(tl.int64)[:, None] * (2 * N) + i_I[None, :]
    total_RI = tl.zeros((R, 2 * N), tl.float32)
    p = 0
    while p < P:
        for k in tl.static_range(UNROLL):
            block_RI = partial + (tl.zeros((), tl.int64) + p + k) * rows * (2 * N) + at_RI
            part_RI = tl.load(block_RI, mask=inside_R[:, None] & (p + k < P), other=0.0)
            total_RI += part_RI.to(tl.float32)
        p += UNROLL
    n_I = i_I // 32 * 16 + i_I % 8 * 2 + i_I // 16 % 2
    keep_RI = inside_R[:, None] & (n_I < N_SIZE)[None, :]
    is_B_I = i_I // 8 % 2 == 0
    wide_R = row_R.to(tl.int64)[:, None]
    b_RI, c_RI = dB + wide_R * b_row + n_I[None, :], dC + wide_R * c_row + n_I[None, :]
    tl.store(b_RI, total_RI.to(dB.dtype.element_ty), mask=keep_RI & is_B_I[None, :])
    tl.store(c_RI, total_RI.to(dC.dtype.element_ty), mask=keep_RI & ~is_B_I[None, :])
