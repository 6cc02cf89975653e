"""Mamba-2's scan: the obvious loop, the chunked matrix form, and a single decode step.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t        (h is [P, N])

Inside a chunk the recurrence is masked attention with decays for weights; between chunks only
states travel: Dao and Gu, "Transformers are SSMs", arXiv:2405.21060, section 6.
Legend for shapes: B batch, L length, H heads, P head dim, G groups, N state; R = H / G heads of a
group, K chunks of Q tokens, S = K * G.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .common import documents, require, require_tokens, without_autocast, working_dtype
from .state_space_chunks import ssd_chunks


def ssd(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None = None,
    *,
    chunk_size: int = 64,
    initial_state_BHPN: Tensor | None = None,
    seq_idx_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over whole sequences: `(y_BLHP, final_state_BHPN)`.

    Args:
        x_BLHP: the input, any floating dtype.
        dt_BLH: step sizes, positive: bias, softplus and clamping are the caller's.
        A_H: one negative number a head (usually `-exp(A_log)`).
        B_BLGN, C_BLGN: input and output projections; head h uses group `h // (H / G)`.
        D_H: the skip connection, or None.
        chunk_size: tokens handled as one matrix. Changes speed and memory, not results: the work
            inside chunks grows with it, the number of states with its inverse.
        initial_state_BHPN: the state before the first token (zero if None). With `seq_idx` it
            belongs to the first document only.
        seq_idx_BL: integers; the state starts from zero wherever they change along a row.

    Returns:
        `y_BLHP` in x's dtype, and the state after the last token in float32 (float64 for a float64
        x). The arithmetic runs in that dtype too, under autocast as well.
        Both can be differentiated once, in every floating argument.

    Raises:
        ValueError: a shape that does not fit, no token, or a chunk size below 1.
        RuntimeError: on backward with `create_graph=True` (use `ssd_ref`).
    """
    _check(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, initial_state_BHPN, seq_idx_BL)
    require_tokens(x_BLHP.shape[1], chunk_size)
    dtype, groups, length = working_dtype(x_BLHP), B_BLGN.shape[2], x_BLHP.shape[1]
    with without_autocast(x_BLHP):
        x, dt, B, C = (tensor.to(dtype) for tensor in (x_BLHP, dt_BLH, B_BLGN, C_BLGN))
        size = min(chunk_size, length)
        document_BL = None if seq_idx_BL is None else documents(seq_idx_BL)
        dt_BSQR = _chunked(dt, size, groups)
        start_BHPN = _initial_state(x, B, initial_state_BHPN)
        y_BSQRP, final_BGRPN = ssd_chunks(
            _chunked(x, size, groups),
            dt_BSQR,
            _chunked(dt * A_H.to(dtype), size, groups),
            _chunked(B, size, groups).squeeze(3),
            _chunked(C, size, groups).squeeze(3),
            start_BHPN.reshape(x.shape[0], groups, -1, *start_BHPN.shape[2:]),
            None if D_H is None else D_H.to(dtype),
            None if document_BL is None else _chunked_documents(document_BL, size, groups),
        )
        y_BLHP = _unchunked(y_BSQRP, groups)[:, :length]
        return y_BLHP.to(x_BLHP.dtype), final_BGRPN.flatten(1, 2)


def ssd_ref(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None = None,
    *,
    chunk_size: int = 64,
    initial_state_BHPN: Tensor | None = None,
    seq_idx_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssd` as a loop over the tokens; `chunk_size` is accepted and unused."""
    _check(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, initial_state_BHPN, seq_idx_BL)
    require_tokens(x_BLHP.shape[1], chunk_size)
    dtype, heads_a_group = working_dtype(x_BLHP), x_BLHP.shape[2] // B_BLGN.shape[2]
    with without_autocast(x_BLHP):
        x, dt, A = x_BLHP.to(dtype), dt_BLH.to(dtype), A_H.to(dtype)
        B_BLHN = B_BLGN.to(dtype).repeat_interleave(heads_a_group, dim=2)
        C_BLHN = C_BLGN.to(dtype).repeat_interleave(heads_a_group, dim=2)
        state_BHPN = _initial_state(x, B_BLHN, initial_state_BHPN)
        outputs = []
        for t in range(x.shape[1]):
            if seq_idx_BL is not None and t > 0:
                is_same_B = seq_idx_BL[:, t] == seq_idx_BL[:, t - 1]
                state_BHPN = state_BHPN * is_same_B[:, None, None, None]
            input_BHPN = (dt[:, t, :, None] * x[:, t])[..., None] * B_BLHN[:, t, :, None, :]
            state_BHPN = torch.exp(dt[:, t] * A)[..., None, None] * state_BHPN + input_BHPN
            outputs.append((state_BHPN * C_BLHN[:, t, :, None, :]).sum(-1))
        y_BLHP = torch.stack(outputs, 1)
        if D_H is not None:
            y_BLHP = y_BLHP + D_H.to(dtype)[:, None] * x
        return y_BLHP.to(x_BLHP.dtype), state_BHPN


def ssd_state_update(
    state_BHPN: Tensor,
    x_BHP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    D_H: Tensor | None = None,
) -> Tensor:
    """One decode step: overwrite `state_BHPN` and return `y_BHP` in x's dtype.

    The arguments are those of `ssd` at one token. The state keeps its own dtype; the step itself
    is computed as in the scan. Not differentiable through the state.

    Raises:
        ValueError: a shape that does not fit.
    """
    x_B1HP, dt_B1H, B_B1GN, C_B1GN = (t.unsqueeze(1) for t in (x_BHP, dt_BH, B_BGN, C_BGN))
    _check(x_B1HP, dt_B1H, A_H, B_B1GN, C_B1GN, D_H, state_BHPN, None)
    dtype, groups = working_dtype(x_BHP), B_BGN.shape[1]
    with without_autocast(x_BHP):
        x, dt = x_BHP.to(dtype), dt_BH.to(dtype).unsqueeze(-1)
        decay_BH11 = torch.exp(dt * A_H.to(dtype).unsqueeze(-1)).unsqueeze(-1)
        # The heads of a group share B and C, so fold them into the rows of one small matrix.
        fed = (x * dt).view(x.shape[0], groups, -1)
        added = fed.unsqueeze(-1) * B_BGN.to(dtype).unsqueeze(2)
        new_BHPN = torch.addcmul(added.view(state_BHPN.shape), decay_BH11, state_BHPN.to(dtype))
        state_BHPN.copy_(new_BHPN)
        y_BHP = torch.matmul(new_BHPN.view_as(added), C_BGN.to(dtype).unsqueeze(-1)).view(x.shape)
        if D_H is not None:
            y_BHP = torch.addcmul(y_BHP, x, D_H.to(dtype).unsqueeze(-1))
        return y_BHP.to(x_BHP.dtype)


def _chunked(tensor_BLH: Tensor, size: int, groups: int) -> Tensor:
    """`[B, L, H, ...]` to `[B, S, Q, R, ...]`; missing tokens are zero.

    With dt zero a token neither decays the state nor adds to it, so padding leaves no trace.
    """
    missing = -tensor_BLH.shape[1] % size
    if missing:
        tensor_BLH = pad(tensor_BLH, (0, 0) * (tensor_BLH.ndim - 2) + (0, missing))
    batch, _, heads, *rest = tensor_BLH.shape
    split = tensor_BLH.reshape(batch, -1, size, groups, heads // groups, *rest)
    return split.transpose(2, 3).flatten(1, 2)


def _chunked_documents(document_BL: Tensor, size: int, groups: int) -> Tensor:
    """`[B, L]` to `[B, S, Q]`; padding belongs to the last document, or it would reset."""
    missing = -document_BL.shape[1] % size
    filled_BL = torch.cat((document_BL, document_BL[:, -1:].expand(-1, missing)), 1)
    return filled_BL.view(filled_BL.shape[0], -1, size).repeat_interleave(groups, dim=1)


def _unchunked(y_BSQRP: Tensor, groups: int) -> Tensor:
    """`[B, S, Q, R, P]` back to `[B, L, H, P]`."""
    batch, _, size, heads_a_group, headdim = y_BSQRP.shape
    split = y_BSQRP.view(batch, -1, groups, size, heads_a_group, headdim)
    return split.transpose(2, 3).reshape(batch, -1, groups * heads_a_group, headdim)


def _initial_state(x_BLHP: Tensor, B_BLGN: Tensor, initial_state_BHPN: Tensor | None) -> Tensor:
    if initial_state_BHPN is None:
        batch, _, heads, headdim = x_BLHP.shape
        return x_BLHP.new_zeros((batch, heads, headdim, B_BLGN.shape[-1]))
    return initial_state_BHPN.to(x_BLHP.dtype)


def _check(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None,
    state_BHPN: Tensor | None,
    seq_idx_BL: Tensor | None,
) -> None:
    if x_BLHP.ndim != 4 or B_BLGN.ndim != 4:
        raise ValueError(
            f"x must be [batch, length, heads, headdim] and B [batch, length, groups, state], got "
            f"{tuple(x_BLHP.shape)} and {tuple(B_BLGN.shape)}"
        )
    batch, length, heads, headdim = x_BLHP.shape
    groups, n_state = B_BLGN.shape[2:]
    if groups < 1 or heads % groups:
        raise ValueError(f"{heads} heads cannot be shared out evenly among {groups} groups")
    require("dt", dt_BLH, (batch, length, heads))
    require("A", A_H, (heads,))
    require("B", B_BLGN, (batch, length, groups, n_state))
    require("C", C_BLGN, (batch, length, groups, n_state))
    if D_H is not None:
        require("D", D_H, (heads,))
    if state_BHPN is not None:
        require("the state", state_BHPN, (batch, heads, headdim, n_state))
    if seq_idx_BL is not None:
        require("seq_idx", seq_idx_BL, (batch, length))
