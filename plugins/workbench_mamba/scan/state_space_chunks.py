"""The chunked SSD algorithm as one autograd function, a few rows of the batch at a time.

Forward and backward each make a dozen passes over matrices of `Q * Q` or `Q * P` a chunk and
head. Over the whole batch every pass would go to memory; over a row they stay in a core's cache,
where recomputing decays, scores and states in the backward pass costs less than loading them.
So nothing but the arguments is kept for the backward pass.

Precision: exponents are differences of cumulative sums, so those run in float64. In float32 one
step of -500 would leave an absolute error of 3e-5 in every later exponent of its chunk.

Legend: B batch, K chunks, G groups, Q tokens of one chunk, R heads of a group, P head dim,
N state, S = K * G; inside a block of rows Z = rows * S.
arXiv:2405.21060, sections 6 and 7; the backward pass is derived here.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .common import LOG2_E, Workspace, forbid_double_backward, row_blocks, without_autocast

# Numbers of x in one block on a CPU: a row of 256 tokens and 4 heads of 64.
CACHE_BLOCK = 1 << 19


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
                block = _Block(workspace, start_BGRPN[rows], document, *rows_of_tensors)
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
        block = _Block(workspace, start_BGRPN[rows], document, *rows_of_tensors)
        block.write_outputs(y_BSQRP[rows], D_H)
        final_BGRPN[rows].copy_(block.final)
    return y_BSQRP, final_BGRPN


class _Block:
    """Some rows of the batch, with everything that forward and backward both need.

    Attributes: `xdt` `[Z * R, Q, P]` is the input times dt, and `fed` `[Z, Q, R, P]` the same
    decayed to the chunk's end; `decay` and `weights` `[Z, R, Q, Q]` lead from token to token,
    without and with `C_i B_j`; `starts` `[Z, R * P, N]` are the chunks' first states and `final`
    `[rows, G, R, P, N]` is the last.
    """

    def __init__(
        self,
        workspace: Workspace,
        start: Tensor,
        document: Tensor | None,
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        B: Tensor,
        C: Tensor,
    ) -> None:
        rows, s, q, r, p = x.shape
        groups, n, z = start.shape[1], B.shape[-1], rows * s
        self.take = workspace.take
        self.tokens, self.by_chunk = (z, q, r, p), (rows, s // groups, groups, r, p, n)
        self.x, self.dt = x.reshape(self.tokens), dt.reshape(z, q, r, 1)
        self.B, self.C = B.reshape(z, q, n), C.reshape(z, q, n)
        by_head = self.take("xdt", z, r, q, p)
        torch.mul(self.x.transpose(1, 2), self.dt.transpose(1, 2), out=by_head)
        self.xdt = by_head.flatten(0, 1)
        self._set_decays(a.reshape(z, q, r), groups, document)
        scores = torch.bmm(self.C, self.B.transpose(1, 2), out=self.take("scores", z, q, q))
        weights = self.take("weights", *self.decay.shape)
        self.weights = torch.mul(self.decay, scores.unsqueeze(1), out=weights)
        self._set_states(start)

    def _set_decays(self, a_ZQR: Tensor, groups: int, document: Tensor | None) -> None:
        """Token to token, chunk start to token, token to chunk end, chunk start to end."""
        z, q, r = a_ZQR.shape
        total_ZRQ = a_ZQR.transpose(1, 2).to(_exact(a_ZQR)).mul(LOG2_E).contiguous().cumsum(2)
        between = self.take("decay", z, r, q, q)
        coarse = total_ZRQ.to(a_ZQR.dtype)
        fine = (total_ZRQ - coarse).to(a_ZQR.dtype)
        torch.sub(coarse.unsqueeze(3), coarse.unsqueeze(2), out=between)
        between.add_(fine.unsqueeze(3)).sub_(fine.unsqueeze(2))
        barred = a_ZQR.new_full((q, q), -torch.inf).triu(1)
        from_start = coarse
        to_end = (total_ZRQ[:, :, -1:] - total_ZRQ).to(a_ZQR.dtype)
        through = from_start[:, :, -1]
        if document is not None:
            # The state that enters a chunk belongs to the last document of the chunk before.
            last = document[:, :, -1]
            before = torch.cat((torch.zeros_like(last[:, :groups]), last[:, :-groups]), 1)
            first_Z1, last_Z1, document_ZQ = (
                before.reshape(z, 1), last.reshape(z, 1), document.reshape(z, q)
            )  # fmt: skip
            is_other = document_ZQ.unsqueeze(2) != document_ZQ.unsqueeze(1)
            barred = barred.expand(z, q, q).masked_fill(is_other, -torch.inf).unsqueeze(1)
            other_start, other_end = document_ZQ != first_Z1, document_ZQ != last_Z1
            from_start = from_start.masked_fill(other_start.unsqueeze(1), -torch.inf)
            to_end = to_end.masked_fill(other_end.unsqueeze(1), -torch.inf)
            through = through.masked_fill(first_Z1 != last_Z1, -torch.inf)
        # Barred before exp2: the upper triangle holds positive exponents that could overflow.
        # By addition, because masked_fill_ takes four times as long.
        self.decay = between.add_(barred).exp2_()
        self.from_start, self.to_end = (
            exponent.exp2().transpose(1, 2).unsqueeze(3) for exponent in (from_start, to_end)
        )
        self.through = through.exp2().view(*self.by_chunk[:4], 1, 1)

    def _set_states(self, start: Tensor) -> None:
        z, q, r, p = self.tokens
        fed = self.take("fed", *self.tokens)
        self.fed = torch.mul(self.x, self.dt * self.to_end, out=fed)
        added = self.take("added", *self.by_chunk)
        fed_by_state = self.fed.view(z, q, r * p).transpose(1, 2)
        torch.bmm(fed_by_state, self.B, out=added.view(z, r * p, -1))
        starts = self.take("starts", *self.by_chunk)
        self.final = self.take("final", *start.shape).copy_(start)
        for chunk in range(starts.shape[1]):
            starts[:, chunk].copy_(self.final)
            torch.addcmul(added[:, chunk], self.through[:, chunk], self.final, out=self.final)
        self.starts = starts.view(z, r * p, -1)

    def carried(self, out: Tensor) -> Tensor:
        """What the chunks' first states alone would put out, undecayed: `[Z, Q, R, P]`."""
        z, q, r, p = self.tokens
        torch.bmm(self.C, self.starts.transpose(1, 2), out=out.view(z, q, r * p))
        return out.view(self.tokens)

    def write_outputs(self, y: Tensor, D_H: Tensor | None) -> None:
        """Write `y`, contiguous `[rows, S, Q, R, P]`."""
        inside = self.take("added", *self.xdt.shape)  # the name's former holder has served
        torch.bmm(self.weights.flatten(0, 1), self.xdt, out=inside)
        carried = self.carried(y)
        torch.addcmul(self.by_token(inside), carried, self.from_start, out=carried)
        if D_H is not None:
            carried.addcmul_(self.x, self.skip(D_H))

    def skip(self, D_H: Tensor) -> Tensor:
        """D for each chunk's heads, `[Z, 1, R, 1]`."""
        rows, chunks = self.by_chunk[:2]
        return D_H.expand(rows * chunks, -1).reshape(self.tokens[0], 1, -1, 1)

    def by_token(self, tensor: Tensor) -> Tensor:
        """The view `[Z, Q, R, P]` of a tensor `[Z * R, Q, P]`."""
        z, q, r, p = self.tokens
        return tensor.view(z, r, q, p).transpose(1, 2)


def _exact(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64  # MPS has no float64


class _Backward:
    """The gradients of one block; its decays, weights and states are used up.

    A buffer whose holder has served is taken again under its name: the fewer, the more stay in
    the cache.
    """

    def __init__(self, block: _Block, dy: Tensor, dstate: Tensor) -> None:
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
        dto_end = block.fed.mul_(dxdt).sum(3).to(_exact(dxdt))
        carried = block.carried(take("fed", *block.tokens))
        dtotal = dcarried.mul_(carried).sum(3).to(_exact(dxdt)).sub_(dto_end)
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
        # Pairs on one side of a token must cancel to nothing in its exponent, hence exactly.
        exact = take("exact", *decay.shape, dtype=_exact(decay)).copy_(dexponent)
        return (exact.sum(3) - exact.sum(2)).transpose(1, 2)
