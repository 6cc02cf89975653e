"""Mamba-1's selective scan on an NVIDIA GPU, forward and backward, as plain functions on tensors.

They allocate their results and launch kernels, nothing else: no synchronisation, nothing recorded
for autograd, the same launches for the same shapes. Triton is imported at the first call.
Gradients that sum over batch and time are sums of partial sums in a fixed order: deterministic.

Legend for shapes: B batch, L length, D channels, N state, S segments, K chunks, P channel blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .triton_selective_plan import (
    CHUNK,
    Inputs,
    Plan,
    contiguous_channels,
    float32,
    kept_dtype,
    plan_backward,
    plan_forward,
    prepare,
    segment_buffers,
    states_first,
)


class Outputs(NamedTuple):
    """The forward pass's results.

    Attributes:
        y_BLD: in u's dtype, before the gate; None if there is a gate and nothing is saved.
        gated_BLD: y times the gate's silu; None without a gate.
        final_BDN: the state after the last token, float32.
        checkpoints: the states `[B, K, N, D]` that the backward pass starts from, maybe empty.
    """

    y_BLD: Tensor | None
    gated_BLD: Tensor | None
    final_BDN: Tensor
    checkpoints: Tensor


class Gradients(NamedTuple):
    """The gradients of the arguments, None for those that were."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor | None


def checkpoint_shape(batch: int, length: int, channels: int, n_state: int) -> tuple[int, ...]:
    """Of what `selective_scan_forward` saves, in `kept_dtype` of u's."""
    return (batch, -(-length // CHUNK), n_state, channels)


def selective_scan_forward(
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor | None,
    delta_bias_D: Tensor | None,
    initial_state_BDN: Tensor | None,
    seq_idx_BL: Tensor | None,
    *,
    delta_softplus: bool,
    save: bool,
    z_BLD: Tensor | None = None,
    segments: int | None = None,
) -> Outputs:
    """Run the scan.

    Args:
        u_BLD, delta_BLD, z_BLD: any floating dtype, last dimension contiguous, else any strides.
        A_DN, D_D, delta_bias_D, initial_state_BDN: float32.
        B_BLN, C_BLN: any floating dtype and strides.
        seq_idx_BL: int32; the state starts from zero wherever it changes along a row.
        delta_softplus: whether delta, with the bias added, still goes through softplus.
        save: whether to keep what the backward pass reads (else `checkpoints` is empty).
        z_BLD: the gate.
        segments: how many parts of the time run at once; by default what fills the device.
    """
    plan = plan_forward(u_BLD, A_DN.shape[1], segments)
    tensors = (u_BLD, delta_BLD, A_DN, B_BLN, C_BLN, D_D, delta_bias_D, seq_idx_BL)
    inputs = prepare(*tensors, plan, delta_softplus)
    shape = (plan.batch, plan.length, plan.channels)
    y = u_BLD.new_empty(shape) if save or z_BLD is None else None
    gated = None if z_BLD is None else u_BLD.new_empty(shape)
    final_BND = float32(u_BLD, plan.batch, plan.n_state, plan.channels)
    kept = checkpoint_shape(*shape, plan.n_state) if save else (0,)
    checkpoints = u_BLD.new_empty(kept, dtype=kept_dtype(u_BLD.dtype))
    z = None if z_BLD is None else contiguous_channels(z_BLD)
    initial = None if initial_state_BDN is None else states_first(initial_state_BDN)
    _launch_forward(inputs, z, initial, y, gated, final_BND, checkpoints, save)
    return Outputs(y, gated, final_BND.transpose(1, 2).contiguous(), checkpoints)


def _launch_forward(
    inputs: Inputs,
    z: Tensor | None,
    initial: Tensor | None,
    y: Tensor | None,
    gated: Tensor | None,
    final_BND: Tensor,
    checkpoints: Tensor,
    save: bool,
) -> None:
    from .triton_selective_forward import scan_forward, segment_states

    plan, u, delta = inputs.plan, inputs.u, inputs.delta
    local, decays = segment_buffers(plan, u)
    constants = {**inputs.constants, "U_ROW": u.stride(1)}
    strides = (u.stride(0), delta.stride(0))
    read = (u, delta, inputs.A_ND, inputs.packed)
    sizes = (inputs.seq_stride, plan.length, plan.segment, plan.segments)
    if plan.segments > 1:
        segment_states[(plan.blocks, plan.batch, plan.segments - 1)](
            *(*read, inputs.bias_D, inputs.seq_BL, local, decays, *strides, *sizes, 0),
            **constants,
        )
    scan_forward[(plan.blocks, plan.batch, plan.segments)](
        *(*read, inputs.skip_D, inputs.bias_D, inputs.seq_BL, initial, z),
        *(y, gated, final_BND, checkpoints, local, decays),
        *(*strides, 0 if z is None else z.stride(0), *sizes, plan.chunks, 0),
        Z_ROW=0 if z is None else z.stride(1),
        HAS_D=inputs.skip_D is not None,
        HAS_Z=z is not None,
        HAS_INITIAL=initial is not None,
        SAVE=save,
        PLAIN=y is not None,
        **constants,
    )


def selective_scan_backward(
    dy_BLD: Tensor,
    dfinal_BDN: Tensor | None,
    checkpoints: Tensor,
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor | None,
    delta_bias_D: Tensor | None,
    initial_state_BDN: Tensor | None,
    seq_idx_BL: Tensor | None,
    *,
    delta_softplus: bool,
    dB_BLN: Tensor | None = None,
    dC_BLN: Tensor | None = None,
    segments: int | None = None,
) -> Gradients:
    """The gradients, of outputs before the gate.

    The arguments are the forward pass's, its `checkpoints`, and the gradients of `y_BLD` and of
    the final state, which may be None. `dB_BLN` and `dC_BLN` are slices to write those into.
    """
    plan = plan_backward(u_BLD, A_DN.shape[1], segments)
    tensors = (u_BLD, delta_BLD, A_DN, B_BLN, C_BLN, D_D, delta_bias_D, seq_idx_BL)
    inputs = prepare(*tensors, plan, delta_softplus)
    shape, state = (plan.batch, plan.length, plan.channels), (plan.n_state, plan.channels)
    rows = plan.batch * plan.segments
    du, ddelta = u_BLD.new_empty(shape), delta_BLD.new_empty(shape)
    dinitial = None if initial_state_BDN is None else float32(u_BLD, plan.batch, *state)
    # Of each program, of A, then of D and the bias: one sum over programs serves all.
    totals = float32(u_BLD, rows, plan.n_state + 2, plan.channels)
    exact = torch.float32 in (u_BLD.dtype, B_BLN.dtype)
    partial = u_BLD.new_empty(
        (plan.blocks, plan.batch * plan.length, 2, plan.N),
        dtype=torch.float32 if exact else torch.bfloat16,
    )
    dfinal = None if dfinal_BDN is None else states_first(dfinal_BDN)
    written = (du, ddelta, dinitial, totals, partial)
    _launch_backward(inputs, contiguous_channels(dy_BLD), dfinal, checkpoints, written, exact)
    if dB_BLN is None:
        dB_BLN = B_BLN.new_empty(B_BLN.shape)
    if dC_BLN is None:
        dC_BLN = C_BLN.new_empty(C_BLN.shape)
    _sum_partials(plan, partial, dB_BLN, dC_BLN)
    dA_ND, dD, dbias = totals.sum(0).tensor_split((plan.n_state, plan.n_state + 1))
    return Gradients(
        *(du, ddelta, dA_ND.t().contiguous(), dB_BLN, dC_BLN),
        None if D_D is None else dD[0].clone(),  # operators may not return views of one
        None if delta_bias_D is None else dbias[0].clone(),
        None if dinitial is None else dinitial.transpose(1, 2).contiguous(),
    )


def _launch_backward(
    inputs: Inputs,
    dy: Tensor,
    dfinal: Tensor | None,
    checkpoints: Tensor,
    written: tuple[Tensor | None, ...],
    exact: bool,
) -> None:
    from .triton_selective_backward import scan_backward, segment_adjoints

    plan, u, delta = inputs.plan, inputs.u, inputs.delta
    local, decays = segment_buffers(plan, u)
    constants = {**inputs.constants, "DY_ROW": dy.stride(1)}
    sizes = (inputs.seq_stride, plan.length, plan.segment, plan.segments)
    read = (inputs.A_ND, inputs.packed)
    if plan.segments > 1:
        segment_adjoints[(plan.blocks, plan.batch, plan.segments - 1)](
            *(dy, delta, *read, inputs.bias_D, inputs.seq_BL, local, decays),
            *(dy.stride(0), delta.stride(0), *sizes, 0),
            **constants,
        )
    scan_backward[(plan.blocks, plan.batch, plan.segments)](
        *(dy, dfinal, u, delta, *read, inputs.skip_D, inputs.bias_D, inputs.seq_BL),
        *(checkpoints, local, decays, *written),
        *(dy.stride(0), u.stride(0), delta.stride(0), *sizes, plan.chunks, 0),
        U_ROW=u.stride(1),
        HAS_D=inputs.skip_D is not None,
        HAS_INITIAL=written[2] is not None,
        HAS_DFINAL=dfinal is not None,
        EXACT=exact,
        **constants,
    )


def _sum_partials(plan: Plan, partial: Tensor, dB_BLN: Tensor, dC_BLN: Tensor) -> None:
    from .triton_rows import row_stride
    from .triton_selective_sums import sum_blocks

    rows = plan.batch * plan.length
    sum_blocks[(-(-rows // 16),)](
        *(partial, dB_BLN, dC_BLN, row_stride(dB_BLN), row_stride(dC_BLN)),
        *(rows, plan.n_state, plan.blocks, plan.N, 16, 8),
        num_warps=4,
    )
