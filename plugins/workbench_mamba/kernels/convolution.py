"""The short convolution on a CUDA device: causal-conv1d's kernel, else torch.

Shape suffixes: B batch, L length, C channels, W width.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from workbench.kernels import TORCH, Backend, Operation, choose
from workbench_mamba.scan import causal_conv1d as torch_causal_conv1d
from workbench_mamba.scan import last_inputs

# A copy that travels with an exported model has operators of its own.
NAMESPACE = __name__.replace(".", "_")
HALF = (torch.float16, torch.bfloat16)
ALIGNED = 8  # channels and strides in elements: its channel-last kernel reads 16 bytes at once


def conv_backend(device_type: str, dtype: torch.dtype, channels: int, row: int) -> str:
    """What `causal_conv1d` runs on.

    Args:
        row: elements from one token to the next in the input.
    """
    if device_type != "cuda":
        return TORCH
    fits = dtype in HALF and channels % ALIGNED == 0 and row % ALIGNED == 0
    return choose("causal_conv1d", ("causal-conv1d",) if fits else ())


def causal_conv1d(
    x_BLC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None = None,
    *,
    initial_state_BCW: Tensor | None = None,
    seq_idx_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`workbench_mamba.scan.causal_conv1d` with SiLU, on the fastest kernel that works here."""
    backend = conv_backend(x_BLC.device.type, x_BLC.dtype, x_BLC.shape[2], x_BLC.stride(1))
    plain = initial_state_BCW is None
    if backend == TORCH or not plain:
        return torch_causal_conv1d(
            x_BLC,
            weight_CW,
            bias_C,
            initial_state_BCW=initial_state_BCW,
            seq_idx_BL=seq_idx_BL,
        )
    nothing_BCW = x_BLC.new_zeros((x_BLC.shape[0], *weight_CW.shape))
    y_BLC = _forward(x_BLC, weight_CW, bias_C, seq_idx_BL)
    return y_BLC, last_inputs(x_BLC, nothing_BCW, seq_idx_BL)


@torch.library.custom_op(f"{NAMESPACE}::causal_conv1d_forward", mutates_args=())
def _forward(
    x_BLC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, seq_idx_BL: Tensor | None
) -> Tensor:
    library = import_module("causal_conv1d.cpp_functions")
    y_BCL = library.causal_conv1d_fwd_function(
        x_BLC.transpose(1, 2), weight_CW, bias_C, _int32(seq_idx_BL), None, None, True
    )
    return y_BCL.transpose(1, 2)  # type: ignore[no-any-return]


@_forward.register_fake
def _(x_BLC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, seq_idx_BL: Tensor | None) -> Tensor:
    return x_BLC.new_empty(x_BLC.shape)


@torch.library.custom_op(f"{NAMESPACE}::causal_conv1d_backward", mutates_args=())
def _backward(
    dy_BLC: Tensor,
    x_BLC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    seq_idx_BL: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    library = import_module("causal_conv1d.cpp_functions")
    dx_BCL, dweight_CW, dbias_C, _ = library.causal_conv1d_bwd_function(
        x_BLC.transpose(1, 2),
        weight_CW,
        bias_C,
        dy_BLC.transpose(1, 2),
        _int32(seq_idx_BL),
        None,
        None,
        None,
        False,
        True,
    )
    dx_BLC = dx_BCL.transpose(1, 2)
    return dx_BLC, dweight_CW, weight_CW.new_empty(0) if dbias_C is None else dbias_C


@_backward.register_fake
def _(
    dy_BLC: Tensor,
    x_BLC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    seq_idx_BL: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dbias_C = weight_CW.new_empty(0 if bias_C is None else weight_CW.shape[0])
    return x_BLC.new_empty(x_BLC.shape), torch.empty_like(weight_CW), dbias_C


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy_BLC: Tensor) -> tuple[Tensor | None, ...]:
    x_BLC, weight_CW, bias_C, seq_idx_BL = ctx.saved_tensors
    dx, dweight, dbias = _backward(dy_BLC, x_BLC, weight_CW, bias_C, seq_idx_BL)
    return dx, dweight, None if bias_C is None else dbias, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _int32(seq_idx_BL: Tensor | None) -> Tensor | None:
    return None if seq_idx_BL is None else seq_idx_BL.to(torch.int32).contiguous()


def _probe() -> None:
    x_BLC = torch.zeros(1, 8, 8, device="cuda", dtype=torch.bfloat16)
    _forward(x_BLC, torch.zeros(8, 4, device="cuda"), None, None)


CONV = Operation(
    "causal_conv1d",
    [
        Backend(
            name="causal-conv1d",
            probe=_probe,
            install="pip install --no-build-isolation causal-conv1d",
        )
    ],
)
