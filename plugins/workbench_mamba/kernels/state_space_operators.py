"""Mamba-2's scan as torch operators around kernels of several libraries; see `state_space`.

Shape suffixes: B batch, L length, H heads, P head dim, G groups, N state.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

# A copy that travels with an exported model has operators of its own.
NAMESPACE = __name__.replace(".", "_")
MAMBA_SSM_CHUNK = 256  # its fastest on Hopper at the published sizes


@torch.library.custom_op(f"{NAMESPACE}::ssd_forward", mutates_args=())
def ssd_forward(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None,
    initial_state_BHPN: Tensor | None,
    seq_idx_BL: Tensor | None,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`y_BLHP`, the final state, and what the backward pass wants to find again."""
    arguments = (x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, initial_state_BHPN, seq_idx_BL)
    return _implementation(backend).forward(*arguments, save)  # type: ignore[no-any-return]


@ssd_forward.register_fake
def _(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None,
    initial_state_BHPN: Tensor | None,
    seq_idx_BL: Tensor | None,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, heads, head_dim = x_BLHP.shape
    state = dt_BLH.new_empty((batch, heads, head_dim, B_BLGN.shape[3]))
    saved = _implementation(backend).saved_like(x_BLHP, B_BLGN, save)
    return x_BLHP.new_empty(x_BLHP.shape), state, saved


@torch.library.custom_op(f"{NAMESPACE}::ssd_backward", mutates_args=())
def _backward(
    dy_BLHP: Tensor,
    dstate_BHPN: Tensor | None,
    saved: Tensor,
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None,
    initial_state_BHPN: Tensor | None,
    seq_idx_BL: Tensor | None,
    backend: str,
) -> list[Tensor]:
    """Gradients of x, dt, A, B, C, D and the initial state; empty for what was None."""
    arguments = (x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, initial_state_BHPN, seq_idx_BL)
    gradients = _implementation(backend).backward(dy_BLHP, dstate_BHPN, saved, *arguments)
    return [x_BLHP.new_empty(0) if gradient is None else gradient for gradient in gradients]


@_backward.register_fake
def _(
    dy_BLHP: Tensor,
    dstate_BHPN: Tensor | None,
    saved: Tensor,
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None,
    initial_state_BHPN: Tensor | None,
    seq_idx_BL: Tensor | None,
    backend: str,
) -> list[Tensor]:
    inputs = (x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, initial_state_BHPN)
    return [
        x_BLHP.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)
        for tensor in inputs
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, backend, _ = inputs
    ctx.save_for_backward(output[2], *tensors)
    ctx.backend = backend
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy_BLHP: Tensor | None, dstate: Tensor | None, _: Any) -> tuple[Any, ...]:
    saved, *tensors = ctx.saved_tensors
    if dy_BLHP is None:
        dy_BLHP = torch.zeros_like(tensors[0])
    found = _backward(dy_BLHP, dstate, saved, *tensors, ctx.backend)
    given = [None if tensor is None else grad for tensor, grad in zip(tensors, found, strict=False)]
    return (*given, None, None, None)


ssd_forward.register_autograd(_gradients, setup_context=_setup_context)


def _implementation(backend: str) -> Any:
    """The class with static `forward`, `backward` and `saved_like` of a backend."""
    if backend == "mamba-ssm":
        return _MambaSSM
    from workbench_mamba.kernels.triton_state_space import Triton

    return Triton


class _MambaSSM:
    """mamba-ssm's Triton kernels; the backward pass computes the states again."""

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
        library = import_module("mamba_ssm.ops.triton.ssd_combined")
        y, _, _, _, _, final = library._mamba_chunk_scan_combined_fwd(
            x, dt, A, B, C, MAMBA_SSM_CHUNK, D=D, initial_states=initial, seq_idx=seq_idx
        )
        return y, final, x.new_empty(0)

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
        library = import_module("mamba_ssm.ops.triton.ssd_combined")
        dx, ddt, dA, dB, dC, dD, _, _, dinitial = library._mamba_chunk_scan_combined_bwd(
            dy,
            *(x, dt, A, B, C, x, MAMBA_SSM_CHUNK),
            D=D,
            initial_states=initial,
            dfinal_states=dfinal,
            seq_idx=seq_idx,
        )
        return dx, ddt, dA, dB, dC, dD, dinitial

    @staticmethod
    def saved_like(x: Tensor, B: Tensor, save: bool) -> Tensor:
        return x.new_empty(0)
