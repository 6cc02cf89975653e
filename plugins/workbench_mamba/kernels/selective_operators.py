"""Mamba's selective scan as torch operators around kernels of several libraries; see `selective`.

Shape suffixes: B batch, L length, D channels, N state.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

# A copy that travels with an exported model has operators of its own.
NAMESPACE = __name__.replace(".", "_")


@torch.library.custom_op(f"{NAMESPACE}::selective_scan_forward", mutates_args=())
def scan_forward(
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor | None,
    delta_bias_D: Tensor | None,
    initial_state_BDN: Tensor | None,
    seq_idx_BL: Tensor | None,
    softplus: bool,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`y_BLD`, the final state, and what the backward pass wants to find again."""
    tensors = (u_BLD, delta_BLD, A_DN, B_BLN, C_BLN, D_D, delta_bias_D)
    implementation = _implementation(backend)
    return implementation.forward(*tensors, initial_state_BDN, seq_idx_BL, softplus, save)  # type: ignore[no-any-return]


@scan_forward.register_fake
def _(
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor | None,
    delta_bias_D: Tensor | None,
    initial_state_BDN: Tensor | None,
    seq_idx_BL: Tensor | None,
    softplus: bool,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    state_BDN = u_BLD.new_empty((u_BLD.shape[0], *A_DN.shape), dtype=torch.float32)
    saved = _implementation(backend).saved_like(u_BLD, A_DN, save)
    return u_BLD.new_empty(u_BLD.shape), state_BDN, saved


@torch.library.custom_op(f"{NAMESPACE}::selective_scan_backward", mutates_args=())
def _backward(
    dy_BLD: Tensor,
    dstate_BDN: Tensor | None,
    saved: Tensor,
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor | None,
    delta_bias_D: Tensor | None,
    initial_state_BDN: Tensor | None,
    seq_idx_BL: Tensor | None,
    softplus: bool,
    backend: str,
) -> list[Tensor]:
    """Gradients of the tensors in order; empty for what was None."""
    tensors = (u_BLD, delta_BLD, A_DN, B_BLN, C_BLN, D_D, delta_bias_D)
    gradients = _implementation(backend).backward(
        dy_BLD, dstate_BDN, saved, *tensors, initial_state_BDN, seq_idx_BL, softplus
    )
    return [u_BLD.new_empty(0) if gradient is None else gradient for gradient in gradients]


@_backward.register_fake
def _(
    dy_BLD: Tensor,
    dstate_BDN: Tensor | None,
    saved: Tensor,
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor | None,
    delta_bias_D: Tensor | None,
    initial_state_BDN: Tensor | None,
    seq_idx_BL: Tensor | None,
    softplus: bool,
    backend: str,
) -> list[Tensor]:
    inputs = (u_BLD, delta_BLD, A_DN, B_BLN, C_BLN, D_D, delta_bias_D, initial_state_BDN)
    return [
        u_BLD.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)
        for tensor in inputs
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, softplus, backend, _ = inputs
    ctx.save_for_backward(output[2], *tensors)
    ctx.softplus, ctx.backend = softplus, backend
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy_BLD: Tensor | None, dstate: Tensor | None, _: Any) -> tuple[Any, ...]:
    saved, *tensors = ctx.saved_tensors
    if dy_BLD is None:
        dy_BLD = torch.zeros_like(tensors[0])
    found = _backward(dy_BLD, dstate, saved, *tensors, ctx.softplus, ctx.backend)
    given = [None if tensor is None else grad for tensor, grad in zip(tensors, found, strict=False)]
    return (*given, None, None, None, None)


scan_forward.register_autograd(_gradients, setup_context=_setup_context)


def _implementation(backend: str) -> Any:
    """The class with static `forward`, `backward` and `saved_like` of a backend."""
    if backend == "mamba-ssm":
        return _MambaSSM
    from workbench_mamba.kernels.triton_selective import Triton

    return Triton


class _MambaSSM:
    """mamba-ssm's CUDA kernel, which wants the length last."""

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
        library = import_module("selective_scan_cuda")
        y, states, *_ = library.fwd(
            *_length_last(u, delta), A, *_grouped(B, C), D, None, bias, softplus
        )
        final = states[:, :, -1, 1::2].contiguous()
        return y.transpose(1, 2).contiguous(), final, states if save else u.new_empty(0)

    @staticmethod
    def backward(
        dy: Tensor,
        dfinal: Tensor | None,
        states: Tensor,
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
        if dfinal is not None:
            raise NotImplementedError("mamba-ssm's scan has no gradient of its final state")
        library = import_module("selective_scan_cuda")
        du, ddelta, dA, dB, dC, dD, dbias, *_ = library.bwd(
            *_length_last(u, delta),
            *(A, *_grouped(B, C), D, None, bias),
            *(_length_last(dy)[0], states, None, None, softplus, False),
        )
        du, ddelta = (gradient.transpose(1, 2).contiguous() for gradient in (du, ddelta))
        dB, dC = (gradient.squeeze(1).transpose(1, 2).contiguous() for gradient in (dB, dC))
        return (
            *(du, ddelta, dA, dB.to(B.dtype), dC.to(C.dtype)),
            *(None if D is None else dD, None if bias is None else dbias, None),
        )

    @staticmethod
    def saved_like(u: Tensor, A: Tensor, save: bool) -> Tensor:
        if not save:
            return u.new_empty(0)
        batch, length, channels = u.shape
        shape = (batch, channels, -(-length // 2048), 2 * A.shape[1])
        return u.new_empty(shape, dtype=torch.float32)


def _length_last(*tensors_BLD: Tensor) -> list[Tensor]:
    return [tensor.transpose(1, 2).contiguous() for tensor in tensors_BLD]


def _grouped(*tensors_BLN: Tensor) -> list[Tensor]:
    return [tensor.transpose(1, 2).contiguous().unsqueeze(1) for tensor in tensors_BLN]
