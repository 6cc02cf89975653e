"""The chunked SSD algorithm as one autograd function, a few rows of the batch at a time.

Forward and backward each make a dozen passes over matrices of `Q * Q` or `Q * P` a chunk and
head. A block's matrices stay in a CPU's caches, where recomputing decays, scores and states costs
less than loading them, so nothing but the arguments is kept for the backward pass.

Legend: B batch, K chunks, G groups, Q tokens of one chunk, R heads of a group, P head dim,
N state, S = K * G; inside a block of rows Z = rows * S.
arXiv:2405.21060, sections 6 and 7; the backward pass is derived here.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .common import Workspace, forbid_double_backward, row_blocks, without_autocast
from .state_space_block import Block, exact_dtype

# Numbers of x in one block on a CPU: 8 rows of 256 tokens and 4 heads of 64. Smaller blocks fit a
# closer cache but spend more time on dispatching operations than that saves.
CACHE_BLOCK = 1 << 19

# Numbers summed in float64 at a time: these are read three times and needed no longer.
EXACT_BLOCK = 1 << 17


def ssd_chunks(
    x_BSQRP: Tensor,
    dt_BSQR: Tensor,
    a_BSQR: Tensor,
    B_BSQN: Tensor,
    C_BSQN: Tensor,
    start_BGRPN: Tensor,
    D_H: Tensor | None,
    document_BSQ: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs `y_BSQRP` and the final state, like `start_BGRPN`; `a` is `dt * A`, the exponent.

    All tensors are of one dtype; `document_BSQ` numbers each row's documents from 0. Differentiable
    once, in everything else.
    """
    arguments = (x_BSQRP, dt_BSQR, a_BSQR, B_BSQN, C_BSQN, start_BGRPN, D_H)
    if torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in arguments):
        y_BSQRP, final_BGRPN = _ChunkedSsd.apply(*arguments, document_BSQ)  # type: ignore[no-untyped-call]
        return y_BSQRP, final_BGRPN
    with torch.no_grad():
        return _forward(*arguments, document_BSQ)


class _ChunkedSsd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*arguments)
        ctx.set_materialize_grads(False)
        return _forward(*arguments)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
        forbid_double_backward("ssd_ref")
        *tensors, start_BGRPN, D_H, document_BSQ = ctx.saved_tensors
        gradients = tuple(_contiguous_like(tensor) for tensor in tensors)
        dstate = torch.zeros_like(start_BGRPN, memory_format=torch.contiguous_format)
        if dfinal is not None:
            dstate.copy_(dfinal)
        dD_H = None if D_H is None else torch.zeros_like(D_H)
        dy = torch.zeros_like(tensors[0]) if dy is None else dy
        if dy.is_meta:
            return (*gradients, dstate, dD_H, None)
        workspace = Workspace(tensors[0])
        for rows in _blocks(tensors[0]):
            document = None if document_BSQ is None else document_BSQ[rows]
            with without_autocast(dy):
                rows_of_tensors = (tensor[rows] for tensor in tensors)
                block = Block(workspace, start_BGRPN[rows], document, *rows_of_tensors)
                sweep = _Backward(block, dy[rows], dstate[rows])
                sweep.run(*(gradient[rows] for gradient in gradients))
                if D_H is not None and dD_H is not None:
                    dD_H += sweep.add_skip(gradients[0][rows], D_H)
        return (*gradients, dstate, dD_H, None)


def _blocks(x_BSQRP: Tensor) -> Iterator[slice]:
    return row_blocks(x_BSQRP.shape[0], CACHE_BLOCK // x_BSQRP[0].numel(), x_BSQRP.device)


def _contiguous_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _forward(
    x_BSQRP: Tensor,
    dt_BSQR: Tensor,
    a_BSQR: Tensor,
    B_BSQN: Tensor,
    C_BSQN: Tensor,
    start_BGRPN: Tensor,
    D_H: Tensor | None,
    document_BSQ: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y_BSQRP, final_BGRPN = _contiguous_like(x_BSQRP), _contiguous_like(start_BGRPN)
    if x_BSQRP.is_meta:
        return y_BSQRP, final_BGRPN
    tensors = (x_BSQRP, dt_BSQR, a_BSQR, B_BSQN, C_BSQN)
    workspace = Workspace(x_BSQRP)
    for rows in _blocks(x_BSQRP):
        document = None if document_BSQ is None else document_BSQ[rows]
        rows_of_tensors = (tensor[rows] for tensor in tensors)
        block = Block(workspace, start_BGRPN[rows], document, *rows_of_tensors)
        block.write_outputs(y_BSQRP[rows], D_H)
        final_BGRPN[rows].copy_(block.final)
    return y_BSQRP, final_BGRPN


class _Backward:
    """The gradients of one block; its decays, weights and states are used up.

    A buffer whose holder has served is taken again under its name: the fewer, the more stay in
    the cache.
    """

    def __init__(self, block: Block, dy: Tensor, dstate: Tensor) -> None:
        self.block, self.dy = block, dy.reshape(block.tokens)
        self.dstate = dstate

    def run(self, dx: Tensor, ddt: Tensor, da: Tensor, dB: Tensor, dC: Tensor) -> None:
        """Write the gradients; `dstate` turns from the final state's to the initial one's."""
        block = self.block
        dx, ddt = dx.view(block.tokens), ddt.view(block.dt.shape)
        dB, dC = dB.view_as(block.B), dC.view_as(block.C)
        dtotal = self._between_chunks(dx, dB, dC)
        dtotal += self._inside_chunks(dx, dB, dC)
        # The exponent of token k is part of every sum that ends at k or later.
        da.view(dtotal.shape).copy_(dtotal.flip(1).cumsum(1).flip(1))
        product = block.take("fed", *block.tokens)
        torch.sum(torch.mul(dx, block.x, out=product), 3, keepdim=True, out=ddt)
        dx.mul_(block.dt)

    def add_skip(self, dx: Tensor, D_H: Tensor) -> Tensor:
        """Add the skip connection's part to `dx`; returns the gradient of D."""
        block = self.block
        dx.view(block.tokens).addcmul_(self.dy, block.skip(D_H))
        product = torch.mul(self.dy, block.x, out=block.take("fed", *block.tokens))
        return product.sum((1, 3)).view(-1, D_H.shape[0]).sum(0)

    def _between_chunks(self, dxdt: Tensor, dB: Tensor, dC: Tensor) -> Tensor:
        """What goes through the states; returns the cumulative sums' gradient `[Z, Q, R]`.

        Leaves `dxdt` as if the inputs did not decay to the chunk's end.
        """
        block = self.block
        (z, q, r, p), take = block.tokens, block.take
        dcarried = torch.mul(self.dy, block.from_start, out=take("dcarried", *block.tokens))
        by_state = dcarried.view(z, q, r * p)
        dadded, dthrough = self._states(by_state)
        torch.bmm(block.B, dadded.transpose(1, 2), out=dxdt.view(z, q, r * p))
        torch.bmm(block.fed.view(z, q, r * p), dadded, out=dB)
        torch.bmm(by_state, block.starts, out=dC)
        # An exponent's gradient is the product of what it decays and the gradient of that.
        dto_end = block.fed.mul_(dxdt).sum(3).to(exact_dtype(dxdt))
        carried = block.carried(take("fed", *block.tokens))
        dtotal = dcarried.mul_(carried).sum(3).to(exact_dtype(dxdt)).sub_(dto_end)
        dtotal[:, -1] += dto_end.sum(1) + dthrough
        return dtotal

    def _states(self, dcarried: Tensor) -> tuple[Tensor, Tensor]:
        """The adjoint of the states' recurrence: gradients of what chunks add and of `through`."""
        block = self.block
        dstarts, dadded = (block.take(name, *block.by_chunk) for name in ("dstarts", "added"))
        torch.bmm(dcarried.transpose(1, 2), block.C, out=dstarts.view_as(block.starts))
        for chunk in range(dstarts.shape[1] - 1, -1, -1):
            dadded[:, chunk].copy_(self.dstate)
            torch.addcmul(dstarts[:, chunk], block.through[:, chunk], self.dstate, out=self.dstate)
        product = torch.mul(dadded, block.starts.view_as(dadded), out=dstarts)
        dthrough = product.sum((-2, -1), keepdim=True).mul_(block.through)
        return dadded.view_as(block.starts), dthrough.view(-1, dthrough.shape[3])

    def _inside_chunks(self, dxdt: Tensor, dB: Tensor, dC: Tensor) -> Tensor:
        """What goes from token to token; adds to the gradients, returns as `_between_chunks`."""
        block = self.block
        decay, weights, take = block.decay, block.weights.flatten(0, 1), block.take
        z, q, r, p = block.tokens
        dy = take("starts", z, r, q, p).copy_(self.dy.transpose(1, 2)).flatten(0, 1)
        inside = torch.bmm(weights.transpose(1, 2), dy, out=take("dstarts", *dy.shape))
        torch.addcmul(block.by_token(inside), dxdt, block.to_end, out=dxdt)
        dweights = take("dcarried", *decay.shape)
        torch.bmm(dy, block.xdt.transpose(1, 2), out=dweights.flatten(0, 1))
        dexponent = block.weights.mul_(dweights)
        dscores = decay.mul_(dweights).sum(1)
        dB.baddbmm_(dscores.transpose(1, 2), block.C)
        dC.baddbmm_(dscores, block.B)
        return self._sum_pairs(dexponent).transpose(1, 2)

    def _sum_pairs(self, dexponent: Tensor) -> Tensor:
        """Sums over sources less sums over targets, `[Z, R, Q]`.

        Pairs on one side of a token must cancel to nothing in its exponent, hence exact sums.
        """
        z, r, q, _ = dexponent.shape
        dtype = exact_dtype(dexponent)
        sums = dexponent.new_empty((z, r, q), dtype=dtype)
        for part in row_blocks(z, EXACT_BLOCK // (r * q * q), dexponent.device):
            pairs = dexponent[part]
            exact = self.block.take("exact", *pairs.shape, dtype=dtype).copy_(pairs)
            torch.sub(exact.sum(3), exact.sum(2), out=sums[part])
        return sums
