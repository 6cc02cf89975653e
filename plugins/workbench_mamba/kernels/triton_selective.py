"""The own Triton kernels of Mamba's scan behind the interface of `workbench_mamba.kernels`."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench_mamba.scan.triton_selective import (
    CHUNK,
    selective_scan_backward,
    selective_scan_forward,
)


class Triton:
    """Forward, backward, and the shape of what the one saves for the other."""

    @staticmethod
    def forward(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        bias: Tensor | None,
        initial: Tensor | None,
        seq_idx: Tensor | None,
        softplus: bool,
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return selective_scan_forward(
            *(u, delta, A, B, C, D, bias, None, initial, seq_idx),
            delta_softplus=softplus,
            save=save,
        )

    @staticmethod
    def backward(
        dy: Tensor,
        dfinal: Tensor | None,
        saved: Tensor,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        bias: Tensor | None,
        initial: Tensor | None,
        seq_idx: Tensor | None,
        softplus: bool,
    ) -> tuple[Tensor | None, ...]:
        *gradients, _, dinitial = selective_scan_backward(
            *(dy, dfinal, saved, u, delta, A, B, C, D, bias, None, initial, seq_idx),
            delta_softplus=softplus,
        )
        return (*gradients, dinitial)

    @staticmethod
    def saved_like(u: Tensor, A: Tensor, save: bool) -> Tensor:
        if not save:
            return u.new_empty(0, dtype=torch.float32)
        batch, length, channels = u.shape
        return u.new_empty((batch, -(-length // CHUNK), A.shape[1], channels), dtype=torch.float32)
