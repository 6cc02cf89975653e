"""What one block of rows needs for SSD both forward and backward: decays, weights, states.

Precision: exponents are differences of cumulative sums, so those run in float64. In float32 one
step of -500 would leave an absolute error of 3e-5 in every later exponent of its chunk.

Legend: K chunks, G groups, Q tokens of one chunk, R heads of a group, P head dim, N state,
S = K * G; Z = rows * S. arXiv:2405.21060, section 6.
"""

import torch
from torch import Tensor

from .common import LOG2_E, Workspace


def exact_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype for sums whose terms must cancel."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64  # MPS has no float64


class Block:
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
        if torch.compiler.is_compiling():  # it would give `out` the strides of the inputs
            by_head.copy_(self.x.transpose(1, 2) * self.dt.transpose(1, 2))
        else:
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
        total_ZRQ = a_ZQR.transpose(1, 2).to(exact_dtype(a_ZQR)).mul(LOG2_E).contiguous().cumsum(2)
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
