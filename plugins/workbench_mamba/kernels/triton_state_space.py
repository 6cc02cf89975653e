"""The own Triton kernels of Mamba-2's scan behind the interface of `workbench_mamba.kernels`."""

from __future__ import annotations

from torch import Tensor

from workbench_mamba.scan.triton_ssd import ssd_backward, ssd_forward, tiles


class Triton:
    """Forward, backward, and the shape of what the one saves for the other."""

    @staticmethod
    def forward(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        initial: Tensor | None,
        seq_idx: Tensor | None,
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, final, saved = ssd_forward(x, dt, A, B, C, D, initial, seq_idx, save=save)
        return y, final, saved[0] if save else x.new_empty(0)

    @staticmethod
    def backward(
        dy: Tensor,
        dfinal: Tensor | None,
        saved: Tensor,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        initial: Tensor | None,
        seq_idx: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        return ssd_backward(dy, dfinal, [saved], x, dt, A, B, C, D, initial, seq_idx)

    @staticmethod
    def saved_like(x: Tensor, B: Tensor, save: bool) -> Tensor:
        if not save:
            return x.new_empty(0)
        batch, length, heads, head_dim = x.shape
        tokens = tiles(head_dim, B.shape[3], x.dtype).tokens
        return x.new_empty((batch, heads, -(-length // (2 * tokens)), head_dim, B.shape[3]))
