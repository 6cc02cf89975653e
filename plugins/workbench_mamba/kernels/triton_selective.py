"""The own Triton kernels of Mamba's scan behind the interface of `workbench_mamba.kernels`."""

from __future__ import annotations

from torch import Tensor

from workbench_mamba.scan.triton_selective import (
    checkpoint_shape,
    selective_scan_backward,
    selective_scan_forward,
)
from workbench_mamba.scan.triton_selective_plan import kept_dtype


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
        found = selective_scan_forward(
            *(u, delta, A, B, C, D, bias, initial, seq_idx),
            delta_softplus=softplus,
            save=save,
        )
        assert found.y_BLD is not None
        return found.y_BLD, found.final_BDN, found.checkpoints

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
        return selective_scan_backward(
            *(dy, dfinal, saved, u, delta, A, B, C, D, bias, initial, seq_idx),
            delta_softplus=softplus,
        )

    @staticmethod
    def saved_like(u: Tensor, A: Tensor, save: bool) -> Tensor:
        dtype = kept_dtype(u.dtype)
        shape = checkpoint_shape(*u.shape, A.shape[1]) if save else (0,)
        return u.new_empty(shape, dtype=dtype)
