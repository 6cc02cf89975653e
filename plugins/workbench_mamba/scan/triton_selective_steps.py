# mypy: ignore-errors
"""What the Triton kernels of the selective scan share: one step's arithmetic, and the loads.

Legend for shapes: B batch, L length, D channels, N state, T steps that are unrolled.
"""

import triton
import triton.language as tl

# The value below which log(1 + e) loses digits and its series is used, and the one above which
# softplus is the identity in float32.
SERIES_BELOW = tl.constexpr(0.015625)
IDENTITY_ABOVE = tl.constexpr(20.0)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which knows no assembly."""
    return bool(triton.knobs.runtime.interpret)


@triton.jit
def log2(x, ASSEMBLY: tl.constexpr):
    """Of normal numbers, to 22 bits; tl.log2 takes twenty instructions, one after the other."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )
    return tl.log2(x)


@triton.jit
def sigmoid(x, ASSEMBLY: tl.constexpr):
    """1 / (1 + e^-x); with ASSEMBLY to 23 bits."""
    divisor = 1.0 + tl.exp2(-x * LOG2_E)
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [divisor], tl.float32, is_pure=True, pack=1
        )
    return 1.0 / divisor


@triton.jit
def step_size(raw_D, bias_D, SOFTPLUS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """delta in float32 from what the projection gave, and its slope by that.

    With SOFTPLUS, the bias is added, and softplus' slope is e^x / (1 + e^x): one more power.
    """
    x_D = raw_D.to(tl.float32) + bias_D
    slope_D = tl.full(x_D.shape, 1.0, tl.float32)
    if SOFTPLUS:
        power_D = tl.minimum(x_D, IDENTITY_ABOVE) * LOG2_E
        e_D = tl.exp2(power_D)
        log_D = log2(1.0 + e_D, ASSEMBLY)
        slope_D = tl.exp2(power_D - log_D)
        series_D = e_D * (1.0 - e_D * (0.5 - e_D * 0.33333334))
        positive_D = tl.where(e_D < SERIES_BELOW, series_D, log_D * LN_2)
        x_D = tl.where(x_D <= IDENTITY_ABOVE, positive_D, x_D)  # not a number stays one
    return x_D, slope_D


@triton.jit
def step_sizes(
    raw, bias_D, t, last,
    T: tl.constexpr, SOFTPLUS: tl.constexpr, WHOLE: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """The deltas of T tokens from t on, and their slopes; zero from `last` on: the state stays."""
    deltas, slopes = (), ()
    for j in tl.static_range(T):
        delta_D, slope_D = step_size(raw[j], bias_D, SOFTPLUS, ASSEMBLY)
        if not WHOLE:
            delta_D = tl.where(t + j < last, delta_D, 0.0)
            slope_D = tl.where(t + j < last, slope_D, 0.0)
        deltas = deltas + (delta_D,)  # noqa: RUF005
        slopes = slopes + (slope_D,)  # noqa: RUF005
    return deltas, slopes


@triton.jit
def load_tokens(
    at_D, ROW: tl.constexpr, t, last, mask_D,
    T: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """T rows from the one at `at_D`, token t's; from `last` on they read as zero.

    Rows lie a constant apart, so that one address serves all of them.
    """
    rows = ()
    for j in tl.static_range(T):
        if WHOLE and EVEN:
            row_D = tl.load(at_D + j * ROW)
        elif WHOLE:
            row_D = tl.load(at_D + j * ROW, mask=mask_D, other=0.0)
        else:
            row_D = tl.load(at_D + j * ROW, mask=mask_D & (t + j < last), other=0.0)
        rows = rows + (row_D,)  # noqa: RUF005
    return rows


@triton.jit
def store_token(at_D, value_D, t, last, mask_D, WHOLE: tl.constexpr, EVEN: tl.constexpr):
    value_D = value_D.to(at_D.dtype.element_ty)
    if WHOLE and EVEN:
        tl.store(at_D, value_D)
    elif WHOLE:
        tl.store(at_D, value_D, mask=mask_D)
    else:
        tl.store(at_D, value_D, mask=mask_D & (t < last))


@triton.jit
def load_row(row, N: tl.constexpr, BD: tl.constexpr):
    """B and C of the token whose packed row is given, yet to be split, for each of BD channels.

    They lie in the halves of one 64-bit number. Broadcast here, so that a loop keeps them in the
    layout they are used in.
    """
    return tl.broadcast_to(tl.load(row + tl.arange(0, N))[:, None], (N, BD))


@triton.jit
def load_rows(row, N: tl.constexpr, BD: tl.constexpr, T: tl.constexpr):
    """Those of T tokens."""
    pairs = ()
    for j in tl.static_range(T):
        pairs = pairs + (load_row(row + j * N, N, BD),)  # noqa: RUF005
    return pairs


@triton.jit
def split_pair(pair_ND):
    """B and C from the halves of the 64-bit numbers."""
    b_ND = pair_ND.to(tl.int32).to(tl.float32, bitcast=True)
    c_ND = (pair_ND >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return b_ND, c_ND


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
    read several and exchange them.
    """
    row = index.to(tl.int64) * N_SIZE
    return (row + n_N[:, None]) * D_SIZE + d_D[None, :] + zero


@triton.jit
def load_state(kept_D, n_N, mask_ND, D_SIZE: tl.constexpr, ALL: tl.constexpr):
    """The kept state whose first row lies at `kept_D`; ALL: nothing is masked."""
    at_ND = kept_D[None, :] + n_N[:, None] * D_SIZE
    if ALL:
        return tl.load(at_ND)
    else:  # noqa: RET505 (chosen at compile time)
        return tl.load(at_ND, mask=mask_ND, other=0.0)


@triton.jit
def store_state(kept_D, h_ND, n_N, mask_ND, D_SIZE: tl.constexpr, ALL: tl.constexpr):
    """Keep a state; one address serves all its rows, which lie a constant apart."""
    at_ND = kept_D[None, :] + n_N[:, None] * D_SIZE
    h_ND = h_ND.to(kept_D.dtype.element_ty)
    if ALL:
        tl.store(at_ND, h_ND)
    else:
        tl.store(at_ND, h_ND, mask=mask_ND)


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
    carry_ND, local, decays, first, last, row, d_D, n_N, mask_D, D_SIZE, zero,
    STEP: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
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


@triton.jit
def store_segment(
    local, decays, carry_ND, total_D, kept, A2_ND, index, n_N, d_D, mask_D, D_SIZE, zero,
    N: tl.constexpr,
):  # fmt: skip
    """Write what `combine_segments` reads of a segment; `total_D` is the sum of its deltas."""
    at_ND = state_at(index, n_N, d_D, N, D_SIZE, zero)
    tl.store(local + at_ND, carry_ND, mask=mask_D[None, :])
    tl.store(decays + at_ND, tl.exp2(total_D[None, :] * A2_ND) * kept, mask=mask_D[None, :])
