"""All of Mamba-2 after its input projection as one operator, for training and prefill on CUDA.

Between the projections a block is bound by memory: here every tensor is read where the projection
wrote it, and gradients are written where the projection wants them. What the convolution and the
gated norm give is not kept but computed again for the gradients.

Shape suffixes: B batch, L length, D d_model, R rows of the input projection (gate, convolved
channels, step sizes), I inner channels, C convolved ones, W width of the filter, H heads,
P head dim, N state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench_mamba.scan.common import documents

# A copy that travels with an exported model has operators of its own.
NAMESPACE = __name__.replace(".", "_")


def mamba2_inner(
    zxbcdt_BLR: Tensor,
    conv_weight_CW: Tensor,
    conv_bias_C: Tensor | None,
    dt_bias_H: Tensor,
    A_log_H: Tensor,
    D_H: Tensor,
    norm_weight_I: Tensor,
    *,
    out_weight_DI: Tensor | None,
    groups: int,
    norm_groups: int,
    eps: float,
    dt_limits: tuple[float, float | None],
    seq_idx_BL: Tensor | None = None,
    conv_state_BCW: Tensor | None = None,
    state_BHPN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolution, scan, gated norm and output projection of what `in_proj` gave, `[B, L, D]`.

    Args:
        out_weight_DI: of the output projection, in the dtype of `zxbcdt_BLR`; None to project
            elsewhere: the result is then `[B, L, I]`.
        groups: of heads that share B and C.
        norm_groups: of channels that are normed apart.
        conv_state_BCW, state_BHPN: to continue from, without gradients.

    Returns:
        The output in the projection's dtype, and the state after the last token, float32.
    """
    inner = (zxbcdt_BLR, conv_weight_CW, conv_bias_C, dt_bias_H, A_log_H, D_H, norm_weight_I)
    tensors = (*inner, out_weight_DI)
    save = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )
    low, high = dt_limits
    numbers = (groups, norm_groups, eps, low, float("inf") if high is None else high, save)
    out, final_BHPN, _, _ = _forward(*tensors, seq_idx_BL, conv_state_BCW, state_BHPN, *numbers)
    return out, final_BHPN


@torch.library.custom_op(f"{NAMESPACE}::mamba2_inner_forward", mutates_args=())
def _forward(
    zxbcdt_BLR: Tensor,
    conv_weight_CW: Tensor,
    conv_bias_C: Tensor | None,
    dt_bias_H: Tensor,
    A_log_H: Tensor,
    D_H: Tensor,
    norm_weight_I: Tensor,
    out_weight_DI: Tensor | None,
    seq_idx_BL: Tensor | None,
    conv_state_BCW: Tensor | None,
    state_BHPN: Tensor | None,
    groups: int,
    norm_groups: int,
    eps: float,
    low: float,
    high: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, final state, and for the backward pass the scan's output and its chunks' states."""
    from workbench_mamba.scan.triton_convolution import conv_forward
    from workbench_mamba.scan.triton_gated_norm import gated_norm_forward
    from workbench_mamba.scan.triton_ssd import ssd_forward

    parts = _Parts(zxbcdt_BLR, conv_weight_CW, dt_bias_H, norm_weight_I, groups)
    documents_BL = None if seq_idx_BL is None else documents(seq_idx_BL).int()
    xBC_BLC = conv_forward(parts.xBC, conv_weight_CW, conv_bias_C, documents_BL, conv_state_BCW)
    x, B, C = parts.split(xBC_BLC)
    dt_BLH = F.softplus(parts.raw.float() + dt_bias_H.float()).clamp(low, high)
    A_H = -A_log_H.float().exp()
    y_BLHP, final_BHPN, saved = ssd_forward(
        x, dt_BLH, A_H, B, C, D_H.float(), state_BHPN, seq_idx_BL, save=save
    )
    y_BLI = y_BLHP.flatten(-2)
    out = gated_norm_forward(y_BLI, parts.z, norm_weight_I, norm_groups, eps)
    if out_weight_DI is not None:
        out = F.linear(out, out_weight_DI)
    if not save:
        return out, final_BHPN, out.new_empty(0), out.new_empty(0)
    return out, final_BHPN, y_BLI, saved[0]


@_forward.register_fake
def _(
    zxbcdt_BLR: Tensor,
    conv_weight_CW: Tensor,
    conv_bias_C: Tensor | None,
    dt_bias_H: Tensor,
    A_log_H: Tensor,
    D_H: Tensor,
    norm_weight_I: Tensor,
    out_weight_DI: Tensor | None,
    seq_idx_BL: Tensor | None,
    conv_state_BCW: Tensor | None,
    state_BHPN: Tensor | None,
    groups: int,
    norm_groups: int,
    eps: float,
    low: float,
    high: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from workbench_mamba.scan.triton_ssd import tiles

    parts = _Parts(zxbcdt_BLR, conv_weight_CW, dt_bias_H, norm_weight_I, groups)
    batch, length, _ = zxbcdt_BLR.shape
    y = zxbcdt_BLR.new_empty((batch, length, parts.inner))
    width = parts.inner if out_weight_DI is None else len(out_weight_DI)
    out = zxbcdt_BLR.new_empty((batch, length, width))
    sizes = (parts.head_dim, parts.d_state)
    final = zxbcdt_BLR.new_empty((batch, parts.heads, *sizes), dtype=torch.float32)
    if not save:
        return out, final, out.new_empty(0), out.new_empty(0)
    pairs = -(-length // (2 * tiles(*sizes, zxbcdt_BLR.dtype).tokens))
    return out, final, y, out.new_empty((batch, parts.heads, pairs, *sizes))


@torch.library.custom_op(f"{NAMESPACE}::mamba2_inner_backward", mutates_args=())
def _backward(
    dout: Tensor,
    y_BLI: Tensor,
    states: Tensor,
    zxbcdt_BLR: Tensor,
    conv_weight_CW: Tensor,
    conv_bias_C: Tensor | None,
    dt_bias_H: Tensor,
    A_log_H: Tensor,
    D_H: Tensor,
    norm_weight_I: Tensor,
    out_weight_DI: Tensor | None,
    seq_idx_BL: Tensor | None,
    groups: int,
    norm_groups: int,
    eps: float,
    low: float,
    high: float,
) -> list[Tensor]:
    """Gradients of the tensors up to the output projection's; empty for those that are None."""
    from workbench_mamba.scan.triton_convolution import conv_backward, conv_forward
    from workbench_mamba.scan.triton_gated_norm import gated_norm_backward
    from workbench_mamba.scan.triton_ssd import ssd_backward

    parts = _Parts(zxbcdt_BLR, conv_weight_CW, dt_bias_H, norm_weight_I, groups)
    dzxbcdt_BLR = torch.empty_like(zxbcdt_BLR)
    dz, dxBC, draw = parts.cut(dzxbcdt_BLR)
    dout, dout_weight_DI, out_BLI = dout.contiguous(), None, None
    dout_BLI = dout
    if out_weight_DI is not None:
        dout_BLI, out_BLI = dout @ out_weight_DI, torch.empty_like(y_BLI)
    dy_BLI, dnorm_I = gated_norm_backward(
        dout_BLI, y_BLI, parts.z, norm_weight_I, norm_groups, eps, dz, out_BLI
    )
    if out_BLI is not None:
        dout_weight_DI = dout.flatten(0, 1).t() @ out_BLI.flatten(0, 1)
        del dout_BLI, out_BLI
    documents_BL = None if seq_idx_BL is None else documents(seq_idx_BL).int()
    x, B, C = parts.split(conv_forward(parts.xBC, conv_weight_CW, conv_bias_C, documents_BL))
    step_BLH = F.softplus(parts.raw.float() + dt_bias_H.float())
    dt_BLH = step_BLH.clamp(low, high)
    A_H = -A_log_H.float().exp()
    dx, ddt, dA, dB, dC, dD, _ = ssd_backward(
        dy_BLI.view(x.shape), None, [states], x, dt_BLH, A_H, B, C, D_H.float(), None, seq_idx_BL
    )
    pieces = (dx.flatten(-2), dB.flatten(-2), dC.flatten(-2))
    dweight_CW, dbias_C = conv_backward(
        pieces, parts.xBC, conv_weight_CW, conv_bias_C, documents_BL, dxBC
    )
    # The slope of a softplus, from its value; none where it was clamped.
    draw_BLH = torch.where(step_BLH == dt_BLH, ddt * -torch.expm1(-step_BLH), 0.0)
    draw.copy_(draw_BLH)
    gradients = (dzxbcdt_BLR, dweight_CW, dbias_C, draw_BLH.sum((0, 1)), dA * A_H, dD, dnorm_I)
    given = (zxbcdt_BLR, conv_weight_CW, conv_bias_C, dt_bias_H, A_log_H, D_H, norm_weight_I)
    pairs = zip((*gradients, dout_weight_DI), (*given, out_weight_DI), strict=True)
    return [
        zxbcdt_BLR.new_empty(0) if like is None or gradient is None else gradient.to(like.dtype)
        for gradient, like in pairs
    ]


@_backward.register_fake
def _(
    dout: Tensor,
    y_BLI: Tensor,
    states: Tensor,
    zxbcdt_BLR: Tensor,
    conv_weight_CW: Tensor,
    conv_bias_C: Tensor | None,
    dt_bias_H: Tensor,
    A_log_H: Tensor,
    D_H: Tensor,
    norm_weight_I: Tensor,
    out_weight_DI: Tensor | None,
    seq_idx_BL: Tensor | None,
    groups: int,
    norm_groups: int,
    eps: float,
    low: float,
    high: float,
) -> list[Tensor]:
    given = (zxbcdt_BLR, conv_weight_CW, conv_bias_C, dt_bias_H, A_log_H, D_H, norm_weight_I)
    return [
        zxbcdt_BLR.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)
        for tensor in (*given, out_weight_DI)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, conv_state, state, groups, norm_groups, eps, low, high, _ = inputs
    ctx.save_for_backward(output[2], output[3], *tensors)
    ctx.numbers = (groups, norm_groups, eps, low, high)
    ctx.continued = conv_state is not None or state is not None
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if ctx.continued:
        raise NotImplementedError("no gradients through a continued state: use the torch backend")
    y_BLI, states, *tensors = ctx.saved_tensors
    nothing = (None,) * 9
    if dout is None:
        return (None,) * 8 + nothing
    found = _backward(dout, y_BLI, states, *tensors, *ctx.numbers)
    given = [None if tensor is None else grad for tensor, grad in zip(tensors, found, strict=False)]
    return (*given, *nothing)


_forward.register_autograd(_gradients, setup_context=_setup_context)


class _Parts:
    """The slices of a projection's output."""

    def __init__(
        self,
        zxbcdt_BLR: Tensor,
        conv_weight_CW: Tensor,
        dt_bias_H: Tensor,
        norm_weight_I: Tensor,
        groups: int,
    ) -> None:
        self.inner, self.heads = norm_weight_I.shape[0], dt_bias_H.shape[0]
        self.channels, self.groups = conv_weight_CW.shape[0], groups
        self.head_dim = self.inner // self.heads
        self.d_state = (self.channels - self.inner) // (2 * groups)
        self.z, self.xBC, self.raw = self.cut(zxbcdt_BLR)

    def cut(self, zxbcdt_BLR: Tensor) -> tuple[Tensor, ...]:
        """Gate, convolved channels, step sizes: views."""
        return zxbcdt_BLR.split([self.inner, self.channels, self.heads], -1)  # type: ignore[no-any-return,no-untyped-call]

    def split(self, xBC_BLC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x `[B, L, H, P]`, B and C `[B, L, G, N]`: views."""
        shared = self.groups * self.d_state
        x, B, C = xBC_BLC.split([self.inner, shared, shared], -1)  # type: ignore[no-untyped-call]
        return (
            x.unflatten(-1, (self.heads, self.head_dim)),
            B.unflatten(-1, (self.groups, self.d_state)),
            C.unflatten(-1, (self.groups, self.d_state)),
        )
