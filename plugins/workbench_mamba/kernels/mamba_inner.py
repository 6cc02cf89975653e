"""All of Mamba-1 after its input projection as one operator, for training and prefill on CUDA.

Between the projections a block is bound by memory: here every tensor is read where the projection
wrote it, and gradients are written where the projection wants them. What the convolution and the
gate give is not kept but computed again for the gradients.

Shape suffixes: B batch, L length, D d_model, R rows of the input projection (twice the inner
channels: convolved ones and the gate), C inner channels, W width of the filter, K rank of the step
sizes, P rows of x_proj (K + 2 N), N state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench_mamba.scan.common import documents

# A copy that travels with an exported model has operators of its own.
NAMESPACE = __name__.replace(".", "_")


def mamba_inner(
    xz_BLR: Tensor,
    conv_weight_CW: Tensor,
    conv_bias_C: Tensor | None,
    x_weight_PC: Tensor,
    dt_weight_CK: Tensor,
    dt_bias_C: Tensor,
    A_CN: Tensor,
    D_C: Tensor,
    *,
    out_weight_DC: Tensor | None,
    seq_idx_BL: Tensor | None = None,
    conv_state_BCW: Tensor | None = None,
    state_BCN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolution, selection, scan, gate and output projection of what `in_proj` gave, `[B, L, D]`.

    Args:
        x_weight_PC, dt_weight_CK: in the dtype of `xz_BLR`.
        A_CN: negative, float32.
        out_weight_DC: of the output projection, in the dtype of `xz_BLR`; None to project
            elsewhere: the result is then `[B, L, C]`.
        conv_state_BCW, state_BCN: to continue from, without gradients.

    Returns:
        The output in the projection's dtype, and the state after the last token, float32.
    """
    inner = (xz_BLR, conv_weight_CW, conv_bias_C, x_weight_PC, dt_weight_CK, dt_bias_C, A_CN, D_C)
    tensors = (*inner, out_weight_DC)
    save = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )
    out, final_BCN, *_ = _forward(*tensors, seq_idx_BL, conv_state_BCW, state_BCN, save)
    return out, final_BCN


@torch.library.custom_op(f"{NAMESPACE}::mamba_inner_forward", mutates_args=())
def _forward(
    xz_BLR: Tensor,
    conv_weight_CW: Tensor,
    conv_bias_C: Tensor | None,
    x_weight_PC: Tensor,
    dt_weight_CK: Tensor,
    dt_bias_C: Tensor,
    A_CN: Tensor,
    D_C: Tensor,
    out_weight_DC: Tensor | None,
    seq_idx_BL: Tensor | None,
    conv_state_BCW: Tensor | None,
    state_BCN: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, final state, and for the gradients the scan's output, its states and `x_proj`'s."""
    from workbench_mamba.scan.triton_convolution import conv_forward
    from workbench_mamba.scan.triton_selective import selective_scan_forward

    x_BLC, z_BLC = xz_BLR.chunk(2, -1)
    documents_BL = None if seq_idx_BL is None else documents(seq_idx_BL).int()
    u_BLC = conv_forward(x_BLC, conv_weight_CW, conv_bias_C, documents_BL, conv_state_BCW)
    selected_BLP = F.linear(u_BLC, x_weight_PC)
    dt_BLK, B_BLN, C_BLN = _split(selected_BLP, dt_weight_CK, A_CN)
    found = selective_scan_forward(
        *(u_BLC, F.linear(dt_BLK, dt_weight_CK), A_CN, B_BLN, C_BLN, D_C.float()),
        *(dt_bias_C.float(), state_BCN, seq_idx_BL),
        delta_softplus=True,
        save=save,
        z_BLD=z_BLC,
    )
    out = found.gated_BLD
    assert out is not None
    if out_weight_DC is not None:
        out = F.linear(out, out_weight_DC)
    if found.y_BLD is None:
        return out, found.final_BDN, *(out.new_empty(0) for _ in range(3))
    return out, found.final_BDN, found.y_BLD, found.checkpoints, selected_BLP


@_forward.register_fake
def _(
    xz_BLR: Tensor,
    conv_weight_CW: Tensor,
    conv_bias_C: Tensor | None,
    x_weight_PC: Tensor,
    dt_weight_CK: Tensor,
    dt_bias_C: Tensor,
    A_CN: Tensor,
    D_C: Tensor,
    out_weight_DC: Tensor | None,
    seq_idx_BL: Tensor | None,
    conv_state_BCW: Tensor | None,
    state_BCN: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from workbench_mamba.scan.triton_selective import checkpoint_shape
    from workbench_mamba.scan.triton_selective_plan import kept_dtype

    (batch, length, _), (inner, n) = xz_BLR.shape, A_CN.shape
    width = inner if out_weight_DC is None else len(out_weight_DC)
    out = xz_BLR.new_empty((batch, length, width))
    final = xz_BLR.new_empty((batch, inner, n), dtype=torch.float32)
    if not save:
        return out, final, *(out.new_empty(0) for _ in range(3))
    y = xz_BLR.new_empty((batch, length, inner))
    kept = checkpoint_shape(batch, length, inner, n)
    states = xz_BLR.new_empty(kept, dtype=kept_dtype(xz_BLR.dtype))
    return out, final, y, states, xz_BLR.new_empty((batch, length, len(x_weight_PC)))


@torch.library.custom_op(f"{NAMESPACE}::mamba_inner_backward", mutates_args=())
def _backward(
    dout: Tensor,
    y_BLC: Tensor,
    states: Tensor,
    selected_BLP: Tensor,
    xz_BLR: Tensor,
    conv_weight_CW: Tensor,
    conv_bias_C: Tensor | None,
    x_weight_PC: Tensor,
    dt_weight_CK: Tensor,
    dt_bias_C: Tensor,
    A_CN: Tensor,
    D_C: Tensor,
    out_weight_DC: Tensor | None,
    seq_idx_BL: Tensor | None,
) -> list[Tensor]:
    """Gradients of the tensors up to the output projection's; empty for those that are None."""
    from workbench_mamba.scan.triton_convolution import conv_backward, conv_forward

    x_BLC, z_BLC = xz_BLR.chunk(2, -1)
    dxz_BLR = torch.empty_like(xz_BLR)
    dx_BLC, dz_BLC = dxz_BLR.chunk(2, -1)
    dy_BLC, dout_weight_DC = _ungate(dout.contiguous(), y_BLC, z_BLC, dz_BLC, out_weight_DC)
    documents_BL = None if seq_idx_BL is None else documents(seq_idx_BL).int()
    u_BLC = conv_forward(x_BLC, conv_weight_CW, conv_bias_C, documents_BL)
    du_BLC, *selection = _unselect(
        *(dy_BLC, states, selected_BLP, u_BLC, x_weight_PC, dt_weight_CK),
        *(dt_bias_C, A_CN, D_C, seq_idx_BL),
    )
    del dy_BLC, u_BLC
    none = du_BLC.new_empty((*du_BLC.shape[:2], 0))
    dweight_CW, dbias_C = conv_backward(
        (du_BLC, none, none), x_BLC, conv_weight_CW, conv_bias_C, documents_BL, dx_BLC
    )
    given = (xz_BLR, conv_weight_CW, conv_bias_C, x_weight_PC, dt_weight_CK, dt_bias_C, A_CN, D_C)
    gradients = (dxz_BLR, dweight_CW, dbias_C, *selection, dout_weight_DC)
    return [
        xz_BLR.new_empty(0) if like is None or gradient is None else gradient.to(like.dtype)
        for gradient, like in zip(gradients, (*given, out_weight_DC), strict=True)
    ]


@_backward.register_fake
def _(
    dout: Tensor,
    y_BLC: Tensor,
    states: Tensor,
    selected_BLP: Tensor,
    xz_BLR: Tensor,
    conv_weight_CW: Tensor,
    conv_bias_C: Tensor | None,
    x_weight_PC: Tensor,
    dt_weight_CK: Tensor,
    dt_bias_C: Tensor,
    A_CN: Tensor,
    D_C: Tensor,
    out_weight_DC: Tensor | None,
    seq_idx_BL: Tensor | None,
) -> list[Tensor]:
    given = (xz_BLR, conv_weight_CW, conv_bias_C, x_weight_PC, dt_weight_CK, dt_bias_C, A_CN, D_C)
    return [
        xz_BLR.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)
        for tensor in (*given, out_weight_DC)
    ]


def _split(selected_BLP: Tensor, dt_weight_CK: Tensor, A_CN: Tensor) -> tuple[Tensor, ...]:
    """What dt_proj takes, B and C: views."""
    n = A_CN.shape[1]
    return selected_BLP.split([dt_weight_CK.shape[1], n, n], -1)  # type: ignore[no-any-return,no-untyped-call]


def _ungate(
    dout: Tensor, y_BLC: Tensor, z_BLC: Tensor, dz_BLC: Tensor, out_weight_DC: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Write the gate's gradient; those of the scan's output and of the output projection."""
    from workbench_mamba.scan.triton_selective_gate import gate_backward

    if out_weight_DC is None:
        return gate_backward(dout, y_BLC, z_BLC, dz_BLC, None, torch.empty_like(dout)), None
    dout_BLC, gated_BLC = dout @ out_weight_DC, torch.empty_like(y_BLC)
    dy_BLC = gate_backward(dout_BLC, y_BLC, z_BLC, dz_BLC, gated_BLC, dout_BLC)
    return dy_BLC, dout.flatten(0, 1).t() @ gated_BLC.flatten(0, 1)


def _unselect(
    dy_BLC: Tensor,
    states: Tensor,
    selected_BLP: Tensor,
    u_BLC: Tensor,
    x_weight_PC: Tensor,
    dt_weight_CK: Tensor,
    dt_bias_C: Tensor,
    A_CN: Tensor,
    D_C: Tensor,
    seq_idx_BL: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of u, x_proj, dt_proj with its bias, A and D, through the scan."""
    from workbench_mamba.scan.triton_selective import selective_scan_backward

    dt_BLK, B_BLN, C_BLN = _split(selected_BLP, dt_weight_CK, A_CN)
    dselected_BLP = torch.empty_like(selected_BLP)
    ddt_BLK, dB_BLN, dC_BLN = _split(dselected_BLP, dt_weight_CK, A_CN)
    found = selective_scan_backward(
        *(dy_BLC, None, states, u_BLC, F.linear(dt_BLK, dt_weight_CK), A_CN, B_BLN, C_BLN),
        *(D_C.float(), dt_bias_C.float(), None, seq_idx_BL),
        delta_softplus=True,
        dB_BLN=dB_BLN,
        dC_BLN=dC_BLN,
    )
    ddelta_TC = found.delta.flatten(0, 1)
    ddt_BLK.copy_(found.delta @ dt_weight_CK)
    dselected_TP, du_TC = dselected_BLP.flatten(0, 1), found.u.flatten(0, 1)
    du_TC.addmm_(dselected_TP, x_weight_PC)
    dx_weight_PC = dselected_TP.t() @ u_BLC.flatten(0, 1)
    ddt_weight_CK = ddelta_TC.t() @ dt_BLK.flatten(0, 1)
    assert found.D is not None
    assert found.delta_bias is not None
    return found.u, dx_weight_PC, ddt_weight_CK, found.delta_bias, found.A, found.D


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, conv_state_BCW, state_BCN, _ = inputs
    ctx.save_for_backward(*output[2:], *tensors)
    ctx.continued = conv_state_BCW is not None or state_BCN is not None
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if ctx.continued:
        raise NotImplementedError("no gradients through a continued state: use the torch backend")
    y_BLC, states, selected_BLP, *tensors = ctx.saved_tensors
    nothing = (None,) * 4
    if dout is None:
        return (None,) * 9 + nothing
    found = _backward(dout, y_BLC, states, selected_BLP, *tensors)
    given = [None if tensor is None else grad for tensor, grad in zip(tensors, found, strict=False)]
    return (*given, *nothing)


_forward.register_autograd(_gradients, setup_context=_setup_context)
