"""The Mamba-1 recurrence as one autograd function that never stores a state a token.

Storing every state takes `L * N` numbers a channel, and a graph of `L` nodes; both cost more than
the arithmetic. So the forward pass keeps one state a chunk, and the backward pass recomputes the
chunk from it while its buffers are still in the cache (the recomputation of arXiv:2312.00752,
section 3.3.2, at the level of a CPU's cache instead of a GPU's SRAM).

Layout inside a chunk: length first, so that one step is one contiguous block; channels last, so
that the inner loop is long (N is 16, too short to vectorise over).
Legend: L length, B batch, D channels, N state, Q tokens of one chunk, K chunks.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .common import LOG2_E, Workspace, forbid_double_backward, row_blocks, without_autocast

# Numbers in one buffer of one chunk: above it a CPU's caches overflow, far below it the time goes
# into dispatching operations.
CACHE_BLOCK = 1 << 19


def scan_chunks(
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_ND: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    start_BND: Tensor,
    D_D: Tensor | None,
    reset_BL: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """`(y_BLD, final_state_BND)` of the recurrence that `selective_scan` documents.

    All tensors are of one dtype; `reset_BL` is true where the state starts anew.
    Differentiable once, in everything but `reset_BL`.
    """
    arguments = (u_BLD, delta_BLD, A_ND, B_BLN, C_BLN, start_BND, D_D)
    if torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in arguments):
        y_BLD, final_BND = _ChunkedScan.apply(*arguments, reset_BL, chunk_size)  # type: ignore[no-untyped-call]
        return y_BLD, final_BND
    with torch.no_grad():
        y_BLD, final_BND, _ = _forward(*arguments, reset_BL, chunk_size, keep_starts=False)
    return y_BLD, final_BND


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        y_BLD, final_BND, starts_KBND = _forward(*arguments, keep_starts=True)
        *tensors, _, D_D, reset_BL, ctx.chunk_size = arguments
        ctx.save_for_backward(*tensors, D_D, starts_KBND, reset_BL)
        ctx.set_materialize_grads(False)
        return y_BLD, final_BND

    @staticmethod
    def backward(ctx: Any, dy_BLD: Tensor | None, dfinal_BND: Tensor | None) -> tuple[Any, ...]:
        forbid_double_backward("selective_scan_ref")
        *tensors, starts_KBND, reset_BL = ctx.saved_tensors
        dy_BLD = torch.zeros_like(tensors[0]) if dy_BLD is None else dy_BLD
        adjoint_BND = torch.zeros_like(starts_KBND[0])
        if dfinal_BND is not None:
            adjoint_BND.copy_(dfinal_BND)
        gradients = _Gradients(dy_BLD, adjoint_BND, *tensors)
        if not dy_BLD.is_meta:
            with without_autocast(dy_BLD):
                gradients.sweep(starts_KBND, reset_BL, ctx.chunk_size)
        return (*gradients.of_arguments(), None, None)


def _blocks(batch: int, row: int, chunk_size: int, device: torch.device) -> Iterator[slice]:
    return row_blocks(batch, CACHE_BLOCK // (row * chunk_size), device)


def _parts(length: int, chunk_size: int) -> list[slice]:
    return [slice(begin, min(begin + chunk_size, length)) for begin in range(0, length, chunk_size)]


def _forward(
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_ND: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    start_BND: Tensor,
    D_D: Tensor | None,
    reset_BL: Tensor | None,
    chunk_size: int,
    *,
    keep_starts: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, final state and, if kept, the chunks' first states `[K, B, N, D]`."""
    batch, length, _channels = u_BLD.shape
    parts = _parts(length, chunk_size)
    y_BLD = torch.empty_like(u_BLD, memory_format=torch.contiguous_format)
    state_BND = start_BND.clone(memory_format=torch.contiguous_format)
    starts = start_BND.new_empty((len(parts) if keep_starts else 0, *start_BND.shape))
    if u_BLD.is_meta:
        return y_BLD, state_BND, starts
    for rows in _blocks(batch, A_ND.numel(), chunk_size, u_BLD.device):
        chunk = _Chunk(min(chunk_size, length), state_BND[rows])
        for index, part in enumerate(parts):
            if keep_starts:
                starts[index, rows].copy_(state_BND[rows])
            at = (rows, part)
            chunk.load(u_BLD[at], delta_BLD[at], B_BLN[at], C_BLN[at])
            chunk.run(A_ND, state_BND[rows], None if reset_BL is None else reset_BL[at])
            y_BLD[at].transpose(0, 1).copy_(chunk.outputs(D_D))
            state_BND[rows].copy_(chunk.states[-1])
    return y_BLD, state_BND, starts


class _Chunk:
    """The buffers of one chunk of some rows, and the recurrence over them."""

    def __init__(self, size: int, state_BND: Tensor) -> None:
        self.take, shape = Workspace(state_BND).take, state_BND.shape
        # One row more than tokens, so that h_t and h_{t-1} are both views of it.
        self._states = self.take("states", size + 1, *shape)
        self.decay_buffer = self.take("decay", size, *shape)
        # Cut once: making a view costs as much as a step's arithmetic.
        self._state_steps, self._decay_steps = self._states.unbind(0), self.decay_buffer.unbind(0)

    def load(self, u_BQD: Tensor, delta_BQD: Tensor, B_BQN: Tensor, C_BQN: Tensor) -> None:
        """Bring the chunk's arguments into the cache, length first."""
        self.u, self.delta = u_BQD.transpose(0, 1), delta_BQD.transpose(0, 1).contiguous()
        self.B, self.C = (tensor.transpose(0, 1).contiguous() for tensor in (B_BQN, C_BQN))
        self.input = torch.mul(self.u, self.delta).contiguous()
        size = self.delta.shape[0]
        self.decay, self.states = self.decay_buffer[:size], self._states[1 : size + 1]
        self.previous, self.decay_steps = self._states[:size], self._decay_steps[:size]

    def run(self, A_ND: Tensor, start_BND: Tensor, reset_BQ: Tensor | None) -> None:
        """Fill `decay` and `states`, both `[Q, B, N, D]`."""
        torch.mul(self.delta.unsqueeze(2), A_ND * LOG2_E, out=self.decay).exp2_()
        if reset_BQ is not None:
            self.decay.masked_fill_(reset_BQ.t()[:, :, None, None], 0.0)
        torch.mul(self.input.unsqueeze(2), self.B.unsqueeze(3), out=self.states)
        state_BND = self._state_steps[0].copy_(start_BND)
        for decay_BND, next_BND in zip(self.decay_steps, self._state_steps[1:], strict=False):
            state_BND = next_BND.addcmul_(decay_BND, state_BND)

    def outputs(self, D_D: Tensor | None) -> Tensor:
        """`y_QBD`."""
        y_QBD = matrix_rows(self.C, self.states)
        return y_QBD if D_D is None else y_QBD.addcmul_(self.u, D_D)


def matrix_rows(rows_QBN: Tensor, matrices_QBND: Tensor) -> Tensor:
    """One row times one matrix, for each token of each sequence: `[Q, B, D]`."""
    size, batch, n, d = matrices_QBND.shape
    rows = rows_QBN.reshape(size * batch, 1, n)
    return torch.bmm(rows, matrices_QBND.view(size * batch, n, d)).view(size, batch, d)


class _Gradients:
    """The adjoint recurrence, one chunk at a time from the last to the first.

    With g_t the gradient of h_t: g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}; the gradients of
    the arguments at t follow from g_t, h_t and h_{t-1}, all of which live in the buffers.
    """

    def __init__(
        self,
        dy_BLD: Tensor,
        adjoint_BND: Tensor,
        u_BLD: Tensor,
        delta_BLD: Tensor,
        A_ND: Tensor,
        B_BLN: Tensor,
        C_BLN: Tensor,
        D_D: Tensor | None,
    ) -> None:
        self.D, self.dD = D_D, None if D_D is None else torch.zeros_like(D_D)
        self.u, self.delta, self.A, self.B, self.C = u_BLD, delta_BLD, A_ND, B_BLN, C_BLN
        self.dy, self.adjoint = dy_BLD, adjoint_BND
        self.du, self.ddelta, self.dB, self.dC = map(
            torch.empty_like, (u_BLD, delta_BLD, B_BLN, C_BLN)
        )
        self.dA = torch.zeros_like(A_ND)

    def of_arguments(self) -> tuple[Tensor | None, ...]:
        """The gradients of u, delta, A, B, C, the initial state and D."""
        return self.du, self.ddelta, self.dA, self.dB, self.dC, self.adjoint, self.dD

    def sweep(self, starts_KBND: Tensor, reset_BL: Tensor | None, chunk_size: int) -> None:
        """Recompute each chunk's states from its first, then walk it backwards."""
        batch, length, _ = self.u.shape
        parts = _parts(length, chunk_size)
        for rows in _blocks(batch, self.A.numel(), chunk_size, self.u.device):
            chunk = _Chunk(min(chunk_size, length), self.adjoint[rows])
            buffer = chunk.take("adjoint", *chunk.decay_buffer.shape)
            buffer_steps = buffer.unbind(0)
            for index in range(len(parts) - 1, -1, -1):
                at = (rows, parts[index])
                chunk.load(self.u[at], self.delta[at], self.B[at], self.C[at])
                reset_BQ = None if reset_BL is None else reset_BL[at]
                chunk.run(self.A, starts_KBND[index, rows], reset_BQ)
                size = chunk.delta.shape[0]
                self._backwards(chunk, at, buffer[:size], buffer_steps[:size])

    def _backwards(
        self, chunk: _Chunk, at: tuple[slice, slice], adjoint: Tensor, steps: tuple[Tensor, ...]
    ) -> None:
        dy = self.dy[at].transpose(0, 1).contiguous()
        carry = self.adjoint[at[0]]
        outer = zip(dy.unsqueeze(2).unbind(0), chunk.C.unsqueeze(3).unbind(0), strict=True)
        # The decays turn into decayed adjoints as the loop passes them.
        decayed_BND = carry
        for adjoint_BND, decay_BND, (dy_B1D, C_BN1) in zip(
            reversed(steps), reversed(chunk.decay_steps), reversed(tuple(outer)), strict=True
        ):
            torch.addcmul(decayed_BND, C_BN1, dy_B1D, out=adjoint_BND)
            decayed_BND = decay_BND.mul_(adjoint_BND)
        carry.copy_(decayed_BND)

        self._store(self.dC, at, matrix_rows(dy, chunk.states.transpose(2, 3)))
        self._store(self.dB, at, matrix_rows(chunk.input, adjoint.transpose(2, 3)))
        dinput = matrix_rows(chunk.B, adjoint)
        du = dinput * chunk.delta
        if self.D is not None and self.dD is not None:
            du.addcmul_(dy, self.D)
            self.dD += (dy * chunk.u).sum((0, 1))
        self._store(self.du, at, du)

        # With h_{t-1}, decayed adjoints are the gradient of the exponent, delta * A.
        dexponent = chunk.decay.mul_(chunk.previous)
        ddelta = dinput.mul_(chunk.u)
        for dexponent_QBD, A_D in zip(dexponent.unbind(2), self.A, strict=True):
            ddelta.addcmul_(dexponent_QBD, A_D)
        self._store(self.ddelta, at, ddelta)
        dexponent.mul_(chunk.delta.unsqueeze(2))
        # A row of ones through the matrix product: a sum over the outer axes at memory speed.
        pairs = dexponent.shape[0] * dexponent.shape[1]
        self.dA.view(1, -1).addmm_(dexponent.new_ones((1, pairs)), dexponent.view(pairs, -1))

    @staticmethod
    def _store(gradient: Tensor, at: tuple[slice, slice], value_QB: Tensor) -> None:
        gradient[at].copy_(value_QB.transpose(0, 1))
