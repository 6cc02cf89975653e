"""The short convolution as torch operators around causal-conv1d's kernel; see `convolution`.

Shape suffixes: B batch, L length, C channels, W width.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

# A copy that travels with an exported model has operators of its own.
NAMESPACE = __name__.replace(".", "_")


@torch.library.custom_op(f"{NAMESPACE}::causal_conv1d_forward", mutates_args=())
def conv_forward(
    x_BLC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, seq_idx_BL: Tensor | None
) -> Tensor:
    library = import_module("causal_conv1d.cpp_functions")
    y_BCL = library.causal_conv1d_fwd_function(
        x_BLC.transpose(1, 2), weight_CW, bias_C, _int32(seq_idx_BL), None, None, True
    )
    return y_BCL.transpose(1, 2)  # type: ignore[no-any-return]


@conv_forward.register_fake
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


conv_forward.register_autograd(_gradients, setup_context=_setup_context)


def _int32(seq_idx_BL: Tensor | None) -> Tensor | None:
    return None if seq_idx_BL is None else seq_idx_BL.to(torch.int32).contiguous()
