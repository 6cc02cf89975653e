"""A decode step of Mamba-2 between its two projections, as three kernels.

Shape suffixes: B batch, R rows of the projection, I inner channels, C convolved ones, W width of
the filter, H heads, P head dim, N state.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A copy that travels with an exported model has operators of its own.
NAMESPACE = __name__.replace(".", "_")


@torch.library.custom_op(f"{NAMESPACE}::mamba2_step", mutates_args=("conv_state_BCW", "state_BHPN"))
def mamba2_step(
    zxbcdt_BR: Tensor,
    conv_state_BCW: Tensor,
    state_BHPN: Tensor,
    conv_weight_CW: Tensor,
    conv_bias_C: Tensor | None,
    dt_bias_H: Tensor,
    A_log_H: Tensor,
    D_H: Tensor,
    norm_weight_I: Tensor,
    groups: int,
    norm_groups: int,
    eps: float,
    low: float,
    high: float | None,
) -> Tensor:
    """`mamba2_inner` at one token, `[B, I]`; both states are updated in place."""
    from workbench_mamba.scan.triton_gated_norm import gated_norm_forward
    from workbench_mamba.scan.triton_mamba2_step import conv_step, state_step

    inner, channels = norm_weight_I.shape[0], conv_weight_CW.shape[0]
    z_BI, xBC_BC = zxbcdt_BR[:, :inner], zxbcdt_BR[:, inner : inner + channels]
    xBC_BC = conv_step(xBC_BC, conv_state_BCW, conv_weight_CW, conv_bias_C)
    raw_BH = zxbcdt_BR[:, inner + channels :]
    y_BI = state_step(xBC_BC, raw_BH, state_BHPN, A_log_H, D_H, dt_bias_H, groups, (low, high))
    return gated_norm_forward(y_BI, z_BI, norm_weight_I, norm_groups, eps)


@mamba2_step.register_fake
def _(
    zxbcdt_BR: Tensor,
    conv_state_BCW: Tensor,
    state_BHPN: Tensor,
    conv_weight_CW: Tensor,
    conv_bias_C: Tensor | None,
    dt_bias_H: Tensor,
    A_log_H: Tensor,
    D_H: Tensor,
    norm_weight_I: Tensor,
    groups: int,
    norm_groups: int,
    eps: float,
    low: float,
    high: float | None,
) -> Tensor:
    return zxbcdt_BR.new_empty((zxbcdt_BR.shape[0], norm_weight_I.shape[0]))
