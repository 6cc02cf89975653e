# mypy: ignore-errors
"""What the Triton kernels of the selective scan share: one step's arithmetic, and the loads.

Legend for shapes: B batch, L length, D channels, N state, T steps that are unrolled.
"""

import triton
import triton.language as tl

# The value below which log(1 + e) loses digits and its series is used, and the one above which
# softplus is the identity in float32.
SERIES_BELOW = tl.constexpr(0.03125)
IDENTITY_ABOVE = tl.constexpr(20.0)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which knows no assembly."""
    return bool(triton.knobs.runtime.interpret)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def step_size(raw_D, bias_D, SOFTPLUS: tl.constexpr):
    """delta in float32 from what the projection gave: bias added, softplus applied if asked."""
    x_D = raw_D.to(tl.float32) + bias_D
    if SOFTPLUS:
        e_D = tl.exp2(x_D * LOG2_E)
        series_D = e_D * (1.0 - e_D * (0.5 - e_D * (0.33333334 - e_D * (0.25 - e_D * 0.2))))
        positive_D = tl.where(e_D < SERIES_BELOW, series_D, tl.log2(1.0 + e_D) * LN_2)
        x_D = tl.where(x_D > IDENTITY_ABOVE, x_D, positive_D)
    return x_D


@triton.jit
def load_steps(pointer, stride, first, last, d_D, mask_D, T: tl.constexpr, WHOLE: tl.constexpr):
    """T rows from `first` on, as a tuple; rows from `last` on read as zero (none if WHOLE)."""
    rows = ()
    for j in tl.static_range(T):
        if WHOLE:
            row_D = tl.load(pointer + (first + j) * stride + d_D, mask=mask_D, other=0.0)
        else:
            keep_D = mask_D & (first + j < last)
            row_D = tl.load(pointer + (first + j) * stride + d_D, mask=keep_D, other=0.0)
        rows += (row_D,)
    return rows


@triton.jit
def step_sizes(
    raw, bias_D, first, last, T: tl.constexpr, SOFTPLUS: tl.constexpr, WHOLE: tl.constexpr
):
    """The deltas of T rows; zero from `last` on, which leaves the state as it is."""
    deltas = ()
    for j in tl.static_range(T):
        delta_D = step_size(raw[j], bias_D, SOFTPLUS)
        if not WHOLE:
            delta_D = tl.where(first + j < last, delta_D, 0.0)
        deltas += (delta_D,)
    return deltas


@triton.jit
def load_row(packed, t, last, N: tl.constexpr, BD: tl.constexpr):
    """A row of B or of C out of a `[L, 2, N]` (past the end, the last one) for each of BD channels.

    Broadcast here, so that a loop that carries it keeps it in the layout it is used in.
    """
    row = tl.minimum(t, last - 1)
    row_N = tl.load(packed + row * (2 * N) + tl.arange(0, N))
    return tl.broadcast_to(row_N[:, None], (N, BD))


@triton.jit
def load_rows(packed, t, last, N: tl.constexpr, BD: tl.constexpr, T: tl.constexpr):
    rows = ()
    for j in tl.static_range(T):
        rows += (load_row(packed, t + j, last, N, BD),)
    return rows


@triton.jit
def starts_document(seq, t, last, HAS_SEQ: tl.constexpr):
    """Whether token t is another document's than its left neighbour."""
    if HAS_SEQ:
        inside = (t > 0) & (t < last)
        here = tl.load(seq + t, mask=inside, other=0)
        return here != tl.load(seq + t - 1, mask=inside, other=0)
    return False


@triton.jit
def decay(delta_D, A2_ND, starts, HAS_SEQ: tl.constexpr):
    """exp(delta A), with A given in powers of two; zero where a document starts."""
    a_ND = tl.exp2(delta_D[None, :] * A2_ND)
    if HAS_SEQ:
        a_ND = tl.where(starts, 0.0, a_ND)
    return a_ND


@triton.jit
def state_at(index, n_N, d_D, N_SIZE, D_SIZE, zero):
    """Where the states number `index` of a `[..., N, D]` lie.

    `zero` is an argument of the launch that the compiler cannot know: it then takes the address
    for unaligned and reads one channel a thread, the layout of all else, where it would otherwise
    read four and exchange them through shared memory.
    """
    row = index.to(tl.int64) * N_SIZE
    return (row + n_N[:, None]) * D_SIZE + d_D[None, :] + zero


@triton.jit
def load_state_matrix(A, d_D, n_N, D_SIZE, N_SIZE, zero):
    """A of some channels in powers of two, `[N, D]`; zero in the padding, so decays are one."""
    mask_ND = (n_N < N_SIZE)[:, None] & (d_D < D_SIZE)[None, :]
    at_ND = n_N[:, None] * D_SIZE + d_D[None, :] + zero
    return tl.load(A + at_ND, mask=mask_ND, other=0.0) * LOG2_E


@triton.jit
def load_channel(pointer, d_D, mask_D, HAS: tl.constexpr):
    value_D = tl.zeros(d_D.shape, tl.float32)
    if HAS:
        value_D = tl.load(pointer + d_D, mask=mask_D, other=0.0).to(tl.float32)
    return value_D


@triton.jit
def combine_segments(
    carry_ND,
    local,
    decays,
    first,
    last,
    row,
    d_D,
    n_N,
    mask_D,
    D_SIZE,
    zero,
    STEP: tl.constexpr,
    N: tl.constexpr,
):
    """Carry a state over the segments first, first + STEP, ... before `last`.

    `local` and `decays` are `[B * S, N, D]`: what a segment ends with if it starts from zero, and
    what it multiplies its start by. `row` is the batch row's first index there.
    """
    i = first
    while i != last:
        at_ND = state_at(row + i, n_N, d_D, N, D_SIZE, zero)
        factor_ND = tl.load(decays + at_ND, mask=mask_D[None, :], other=0.0)
        carry_ND = factor_ND * carry_ND + tl.load(local + at_ND, mask=mask_D[None, :], other=0.0)
        i += STEP
    return carry_ND
