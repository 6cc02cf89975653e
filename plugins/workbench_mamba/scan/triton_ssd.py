"""Mamba-2's scan and its gradients as Triton kernels, for NVIDIA GPUs; needs triton.

`ssd_forward` and `ssd_backward` compute what `ssd` documents. They are plain functions: no
autograd, no wait for the device, nothing that a CUDA graph could not capture. Import this module
only where triton is there; each combination of shapes and dtypes compiles once.
Legend: B batch, L length, T = L rounded up to whole pairs of chunks, H heads, P head dim, G groups,
N state, K pairs of chunks, Q tokens of one chunk, V channels of a head handled at once.
"""

import dataclasses

import torch
from torch import Tensor

from .triton_ssd_backward import (
    chunk_gradients_kernel,
    projections_kernel,
    state_gradients_kernel,
    steps_kernel,
)
from .triton_ssd_forward import decays_kernel, documents_kernel, scan_kernel

HEAD_DIMS = (16, 32, 64, 128)
STATE_DIMS = (16, 32, 64, 128, 256)

# Heads that a small kernel takes at once: a row of dt is read in pieces of this many numbers.
BLOCK_H = 32


# Of `decays`: dt, its running sums, those less the logarithm of dt, documents begun.
Decays = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut: Q tokens, V channels of a head, and how the walks are launched.

    `least` is the narrowest tile: narrower ones of 16-bit numbers came out wrong on Hopper with
    triton 3.6, so those are filled up with zeros.
    """

    tokens: int
    channels: int
    least: int
    scan: dict[str, int]
    state_gradients: dict[str, int]
    precision: str | None = None

    def blocks(self, headdim: int) -> int:
        """Into how many blocks of channels a head is cut."""
        return -(-headdim // self.channels)

    def width(self, n_state: int) -> int:
        """The tile that holds a row of B or C."""
        return max(n_state, self.least)


def tiles(headdim: int, n_state: int, dtype: torch.dtype) -> Tiles:
    """The fastest of the few that were measured on an H200, within its shared memory."""
    if dtype == torch.float32:
        # Exact products run on the ordinary units, from registers: smaller tiles.
        channels = min(headdim, 32 if n_state <= 128 else 16)
        return Tiles(32, channels, 16, launch(4, 1), launch(4, 1), "ieee")
    if n_state > 128:
        return Tiles(64, 64, 64, launch(8, 1), launch(8, 1))
    return Tiles(64, 64, 64, launch(4, 2), launch(4, 3))


def launch(warps: int, stages: int) -> dict[str, int]:
    """Options of a kernel: warps a program, and how many turns of its loop loads run ahead."""
    return {"num_warps": warps, "num_stages": stages}


def ssd_forward(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None,
    initial_state_BHPN: Tensor | None,
    seq_idx_BL: Tensor | None,
    *,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`(y_BLHP, final_state_BHPN, saved)`: y in x's dtype, the state float32.

    Args:
        x_BLHP, B_BLGN, C_BLGN: of one dtype (float32, bfloat16, float16), any strides.
        dt_BLH, A_H, D_H, initial_state_BHPN, seq_idx_BL: as for `ssd`.
        save: whether `ssd_backward` will follow; otherwise `saved` is empty.

    Raises:
        ValueError: a dtype, head dim or state size that the kernels do not handle.
    """
    check(x_BLHP, B_BLGN, C_BLGN)
    with torch.cuda.device_of(x_BLHP):
        return _forward(
            x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, initial_state_BHPN, seq_idx_BL, save
        )


def _forward(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None,
    initial_state_BHPN: Tensor | None,
    seq_idx_BL: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    x, B, C = (rows(tensor) for tensor in (x_BLHP, B_BLGN, C_BLGN))
    batch, length, heads, headdim = x.shape
    groups, n_state = B.shape[2:]
    cut = tiles(headdim, n_state, x.dtype)
    pairs = -(-length // (2 * cut.tokens))
    decay = decays(dt_BLH, A_H, seq_idx_BL, cut.tokens)
    y = x.new_empty(x.shape)
    final = x.new_empty((batch, heads, headdim, n_state), dtype=torch.float32)
    states = x.new_empty((batch, heads, pairs, headdim, n_state)) if save else y
    start = final if initial_state_BHPN is None else initial_state_BHPN.contiguous()
    scan_kernel[(heads * cut.blocks(headdim), batch)](
        x, B, C, D_H, start, *decay, y, states, final,
        length, decay[0].shape[2], heads, heads // groups,
        *strides(x, B, C),
        D_H is not None, initial_state_BHPN is not None, seq_idx_BL is not None, save,
        cut.precision, cut.tokens, headdim, cut.channels, n_state, cut.width(n_state), **cut.scan,
    )  # fmt: skip
    return y, final, [states] if save else []


def ssd_backward(
    dy_BLHP: Tensor,
    dfinal_BHPN: Tensor | None,
    saved: list[Tensor],
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None,
    initial_state_BHPN: Tensor | None,
    seq_idx_BL: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients `(dx, ddt, dA, dB, dC, dD, dinitial)`; None for an argument that was None.

    dx, dB and dC have the dtype of x, the others float32. `saved` is `ssd_forward`'s; the other
    arguments are those it had.
    """
    with torch.cuda.device_of(x_BLHP):
        return _backward(
            dy_BLHP, dfinal_BHPN, saved[0],
            x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, initial_state_BHPN, seq_idx_BL,
        )  # fmt: skip


def _backward(
    dy_BLHP: Tensor,
    dfinal_BHPN: Tensor | None,
    states_BHKPN: Tensor,
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None,
    initial_state_BHPN: Tensor | None,
    seq_idx_BL: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    x, B, C = (rows(tensor) for tensor in (x_BLHP, B_BLGN, C_BLGN))
    dy = rows(dy_BLHP.to(x.dtype))
    cut = tiles(x.shape[3], B.shape[3], x.dtype)
    decay = decays(dt_BLH, A_H, seq_idx_BL, cut.tokens)
    dstates, dstart = _state_gradients(
        dy, dfinal_BHPN, states_BHKPN, C, decay, cut, initial_state_BHPN
    )
    dx, exponent, direct, dskip, dscores = _chunk_gradients(dy, dstates, x, B, C, D_H, decay, cut)
    dB, dC, carry, through = _projection_gradients(
        dy, states_BHKPN, dstates, dscores, x, B, C, decay, cut
    )
    parts = (exponent, carry, direct, through)
    ddt, dA = _step_gradients(parts, decay[0], A_H, x.shape[1], cut.tokens)
    dD = None if D_H is None else dskip.sum((0, 1, 3))
    return dx, ddt, dA, dB, dC, dD, dstart


def _state_gradients(
    dy: Tensor,
    dfinal: Tensor | None,
    states: Tensor,
    C: Tensor,
    decay: Decays,
    cut: Tiles,
    start: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the states after each pair of chunks, `[B, H, K, P, N]`, and of the initial."""
    _, totals_BHT, _, documents_BT = decay
    batch, heads, _, headdim, n_state = states.shape
    dstates = torch.empty_like(states)
    dstart = None
    if start is not None:
        dstart = dy.new_empty((batch, heads, headdim, n_state), dtype=torch.float32)
    state_gradients_kernel[(heads * cut.blocks(headdim), batch)](
        dy, C, dstates if dfinal is None else dfinal.contiguous(),
        totals_BHT, documents_BT, dstates, dstates if dstart is None else dstart,
        dy.shape[1], totals_BHT.shape[2], heads, heads // C.shape[2],
        *strides(dy, C),
        dfinal is not None, start is not None, documents_BT.numel() > 0,
        cut.precision, cut.tokens, headdim, cut.channels, n_state, cut.width(n_state),
        **cut.state_gradients,
    )  # fmt: skip
    return dstates, dstart


def _chunk_gradients(
    dy: Tensor,
    dstates: Tensor,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D_H: Tensor | None,
    decay: Decays,
    cut: Tiles,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, and parts of the other gradients: by block of channels, and dscores by split of heads."""
    steps_BHT, totals_BHT, sources_BHT, documents_BT = decay
    batch, length, heads, headdim = x.shape
    groups, n_state = B.shape[2:]
    padded = steps_BHT.shape[2]
    chunks, blocks = padded // cut.tokens, cut.blocks(headdim)
    splits = head_splits(batch * chunks * groups, heads // groups)
    dx = x.new_empty(x.shape)
    exponent, direct = (steps_BHT.new_empty((blocks, *steps_BHT.shape)) for _ in range(2))
    dskip = steps_BHT.new_empty((blocks, batch, heads, chunks))
    dscores = steps_BHT.new_empty(
        (batch, groups, splits, chunks // 2, 2 * cut.tokens, 2 * cut.tokens)
    )
    chunk_gradients_kernel[(chunks, groups * splits, batch)](
        x, B, C, D_H, dy, steps_BHT, totals_BHT, sources_BHT, documents_BT, dstates,
        dx, exponent, direct, dskip, dscores,
        batch, length, padded, heads, heads // groups, heads // groups // splits,
        *strides(x, dy, B, C),
        D_H is not None, documents_BT.numel() > 0, cut.precision,
        cut.tokens, headdim, cut.channels, n_state, cut.width(n_state), **launch(4, 1),
    )  # fmt: skip
    return dx, exponent, direct, dskip, dscores


def _projection_gradients(
    dy: Tensor,
    states: Tensor,
    dstates: Tensor,
    dscores: Tensor,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    decay: Decays,
    cut: Tiles,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dB and dC; by block of channels, what states carry into pairs of chunks and through them."""
    steps_BHT, totals_BHT, _, documents_BT = decay
    batch, length, heads, headdim = x.shape
    groups, n_state = B.shape[2:]
    padded, pairs, blocks = steps_BHT.shape[2], states.shape[2], cut.blocks(headdim)
    splits = head_splits(4 * batch * pairs * groups, heads // groups)
    kind = x.dtype if splits == 1 else torch.float32
    dB, dC = (x.new_empty((splits, *B.shape), dtype=kind) for _ in range(2))
    carry = steps_BHT.new_empty((blocks, *steps_BHT.shape))
    through = steps_BHT.new_empty((blocks, batch, heads, pairs))
    projections_kernel[(2 * pairs, 2 * groups * splits, batch)](
        x, B, C, dy, steps_BHT, totals_BHT, documents_BT, states, dstates, dscores,
        dB, dC, carry, through,
        batch, length, padded, heads, groups, heads // groups, heads // groups // splits,
        dscores.shape[2],
        *strides(x, dy, B, C),
        documents_BT.numel() > 0, cut.precision,
        cut.tokens, headdim, cut.channels, n_state, cut.width(n_state), **launch(4, 1),
    )  # fmt: skip
    if splits == 1:
        return dB[0], dC[0], carry, through
    dB, dC = (parts.sum(0).to(x.dtype) for parts in (dB, dC))
    return dB, dC, carry, through


def _step_gradients(
    parts: tuple[Tensor, Tensor, Tensor, Tensor],
    steps_BHT: Tensor,
    A_H: Tensor,
    length: int,
    tokens: int,
) -> tuple[Tensor, Tensor]:
    """ddt and dA."""
    batch, heads, padded = steps_BHT.shape
    pairs = padded // (2 * tokens)
    ddt = steps_BHT.new_empty((batch, length, heads))
    dA = steps_BHT.new_empty((batch, pairs, heads))
    steps_kernel[(pairs, -(-heads // BLOCK_H), batch)](
        *parts, steps_BHT, A_H, ddt, dA, batch, length, padded, heads,
        parts[0].shape[0], tokens, BLOCK_H,
    )  # fmt: skip
    return ddt, dA.sum((0, 1))


def decays(dt_BLH: Tensor, A_H: Tensor, seq_idx_BL: Tensor | None, tokens: int) -> Decays:
    """Of each token, `[B, H, T]`: dt, its running sum as an exponent of 2, that less log2(dt).

    And the documents begun, `[B, T]`, a stand-in without `seq_idx`. Sums and documents count from
    the start of each chunk.
    """
    batch, length, heads = dt_BLH.shape
    padded = -(-length // (2 * tokens)) * 2 * tokens
    chunks = padded // tokens
    steps, totals, sources = (
        dt_BLH.new_empty((batch, heads, padded), dtype=torch.float32) for _ in range(3)
    )
    decays_kernel[(chunks, -(-heads // BLOCK_H), batch)](
        dt_BLH, A_H, steps, totals, sources, length, padded, heads,
        *dt_BLH.stride(), tokens, BLOCK_H,
    )  # fmt: skip
    if seq_idx_BL is None:
        return steps, totals, sources, steps.new_empty(0, dtype=torch.int32)
    documents = seq_idx_BL.new_empty((batch, padded), dtype=torch.int32)
    documents_kernel[(chunks, batch)](
        seq_idx_BL, documents, length, padded, *seq_idx_BL.stride(), tokens
    )
    return steps, totals, sources, documents


def head_splits(programs: int, heads_a_group: int) -> int:
    """Into how many parts a group's heads are cut, so that the device has work everywhere."""
    wanted = -(-512 // programs)
    return next(n for n in range(min(wanted, heads_a_group), 0, -1) if heads_a_group % n == 0)


def strides(*tensors: Tensor) -> list[int]:
    """The tensors' batch strides, then for each that of a token and of a head or group."""
    return [t.stride(0) for t in tensors] + [s for t in tensors for s in t.stride()[1:3]]


def rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its last dimension is contiguous, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def check(x_BLHP: Tensor, B_BLGN: Tensor, C_BLGN: Tensor) -> None:
    """Raise ValueError for what the kernels were not written for."""
    if x_BLHP.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x_BLHP.dtype}: convert it to float32, bfloat16 or float16")
    if not x_BLHP.dtype == B_BLGN.dtype == C_BLGN.dtype:
        raise ValueError(f"x, B and C differ: {x_BLHP.dtype}, {B_BLGN.dtype}, {C_BLGN.dtype}")
    if x_BLHP.shape[-1] not in HEAD_DIMS or B_BLGN.shape[-1] not in STATE_DIMS:
        raise ValueError(
            f"head dim {x_BLHP.shape[-1]} and state {B_BLGN.shape[-1]}: the kernels handle "
            f"{HEAD_DIMS} and {STATE_DIMS}; use `ssd` for others"
        )
