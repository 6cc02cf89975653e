"""Mamba-1's selective scan: the obvious loop, the fast one, and a single decode step.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t        y_t = C_t h_t + D u_t

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752.
Legend for shapes: B batch, L length, D channels, N state.
"""

import torch
from torch import Tensor

from .common import documents, require, require_tokens, without_autocast, working_dtype
from .selective_chunks import scan_chunks


def selective_scan(
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor | None = None,
    *,
    initial_state_BDN: Tensor | None = None,
    seq_idx_BL: Tensor | None = None,
    chunk_size: int = 16,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over whole sequences: `(y_BLD, final_state_BDN)`.

    Args:
        u_BLD: the input, `[B, L, D]`, any floating dtype.
        delta_BLD: step sizes, positive: bias and softplus are the caller's.
        A_DN: the diagonal of the state matrix, negative (usually `-exp(A_log)`).
        B_BLN, C_BLN: input and output projections, one a token.
        D_D: the skip connection, or None.
        initial_state_BDN: the state before the first token (zero if None). With `seq_idx` it
            belongs to the first document only.
        seq_idx_BL: integers; the state starts from zero wherever they change along a row.
        chunk_size: tokens whose states are held at once. Changes speed and memory, not results.

    Returns:
        `y_BLD` in u's dtype, and the state after the last token in float32 (float64 for a float64
        u). The arithmetic runs in that dtype too, under autocast as well.
        Both can be differentiated once, in every floating argument.

    Raises:
        ValueError: a shape that does not fit, no token, or a chunk size below 1.
        RuntimeError: on backward with `create_graph=True` (use `selective_scan_ref`).
    """
    _check(u_BLD, delta_BLD, A_DN, B_BLN, C_BLN, D_D, initial_state_BDN, seq_idx_BL)
    require_tokens(u_BLD.shape[1], chunk_size)
    dtype = working_dtype(u_BLD)
    with without_autocast(u_BLD):
        u = u_BLD.to(dtype)
        start_BDN = _initial_state(u, A_DN, initial_state_BDN)
        y_BLD, final_BND = scan_chunks(
            u,
            delta_BLD.to(dtype),
            A_DN.to(dtype).t().contiguous(),
            B_BLN.to(dtype),
            C_BLN.to(dtype),
            start_BDN.transpose(1, 2),
            None if D_D is None else D_D.to(dtype),
            None if seq_idx_BL is None else _resets(seq_idx_BL),
            chunk_size,
        )
        return y_BLD.to(u_BLD.dtype), final_BND.transpose(1, 2).contiguous()


def selective_scan_ref(
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor | None = None,
    *,
    initial_state_BDN: Tensor | None = None,
    seq_idx_BL: Tensor | None = None,
    chunk_size: int = 16,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` as a loop over the tokens; `chunk_size` is accepted and unused."""
    _check(u_BLD, delta_BLD, A_DN, B_BLN, C_BLN, D_D, initial_state_BDN, seq_idx_BL)
    require_tokens(u_BLD.shape[1], chunk_size)
    dtype = working_dtype(u_BLD)
    with without_autocast(u_BLD):
        u, delta, A = u_BLD.to(dtype), delta_BLD.to(dtype), A_DN.to(dtype)
        B, C = B_BLN.to(dtype), C_BLN.to(dtype)
        state_BDN = _initial_state(u, A, initial_state_BDN)
        outputs = []
        for t in range(u.shape[1]):
            if seq_idx_BL is not None and t > 0:
                is_same_B = seq_idx_BL[:, t] == seq_idx_BL[:, t - 1]
                state_BDN = state_BDN * is_same_B[:, None, None]
            input_BDN = (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
            state_BDN = torch.exp(delta[:, t, :, None] * A) * state_BDN + input_BDN
            outputs.append((state_BDN * C[:, t, None, :]).sum(-1))
        y_BLD = torch.stack(outputs, 1)
        if D_D is not None:
            y_BLD = y_BLD + D_D.to(dtype) * u
        return y_BLD.to(u_BLD.dtype), state_BDN


def selective_state_update(
    state_BDN: Tensor,
    u_BD: Tensor,
    delta_BD: Tensor,
    A_DN: Tensor,
    B_BN: Tensor,
    C_BN: Tensor,
    D_D: Tensor | None = None,
) -> Tensor:
    """One decode step: overwrite `state_BDN` and return `y_BD` in u's dtype.

    The arguments are those of `selective_scan` at one token. The state keeps its own dtype; the
    step itself is computed as in the scan. Not differentiable through the state.

    Raises:
        ValueError: a shape that does not fit.
    """
    batch, channels = u_BD.shape
    n_state = A_DN.shape[-1]
    require("state", state_BDN, (batch, channels, n_state))
    for name, tensor in (("B", B_BN), ("C", C_BN)):
        require(name, tensor, (batch, n_state))
    require("delta", delta_BD, (batch, channels))
    dtype = working_dtype(u_BD)
    with without_autocast(u_BD):
        u, delta = u_BD.to(dtype), delta_BD.to(dtype)
        decay_BDN = torch.exp(delta.unsqueeze(-1) * A_DN.to(dtype))
        input_BDN = (delta * u).unsqueeze(-1) * B_BN.to(dtype).unsqueeze(1)
        new_BDN = torch.addcmul(input_BDN, decay_BDN, state_BDN.to(dtype))
        state_BDN.copy_(new_BDN)
        y_BD = torch.bmm(new_BDN, C_BN.to(dtype).unsqueeze(-1)).squeeze(-1)
        if D_D is not None:
            y_BD = torch.addcmul(y_BD, u, D_D.to(dtype))
        return y_BD.to(u_BD.dtype)


def _initial_state(u_BLD: Tensor, A_DN: Tensor, initial_state_BDN: Tensor | None) -> Tensor:
    if initial_state_BDN is None:
        return u_BLD.new_zeros((u_BLD.shape[0], *A_DN.shape))
    return initial_state_BDN.to(u_BLD.dtype)


def _resets(seq_idx_BL: Tensor) -> Tensor:
    number_BL = documents(seq_idx_BL)
    return number_BL.diff(dim=1, prepend=number_BL[:, :1]) != 0


def _check(
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor | None,
    initial_state_BDN: Tensor | None,
    seq_idx_BL: Tensor | None,
) -> None:
    if u_BLD.ndim != 3 or A_DN.ndim != 2:
        raise ValueError(
            f"u must be [batch, length, channels] and A [channels, state], got "
            f"{tuple(u_BLD.shape)} and {tuple(A_DN.shape)}"
        )
    batch, length, channels = u_BLD.shape
    n_state = A_DN.shape[1]
    require("delta", delta_BLD, (batch, length, channels))
    require("A", A_DN, (channels, n_state))
    require("B", B_BLN, (batch, length, n_state))
    require("C", C_BLN, (batch, length, n_state))
    if D_D is not None:
        require("D", D_D, (channels,))
    if initial_state_BDN is not None:
        require("initial_state", initial_state_BDN, (batch, channels, n_state))
    if seq_idx_BL is not None:
        require("seq_idx", seq_idx_BL, (batch, length))
