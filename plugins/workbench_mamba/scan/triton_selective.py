"""Mamba-1's selective scan on an NVIDIA GPU, forward and backward, as plain functions on tensors.

They allocate their results and launch kernels, nothing else: no synchronisation, nothing recorded
for autograd, the same launches for the same shapes. Triton is imported at the first call.
Gradients that sum over batch and time are sums of partial sums in a fixed order: deterministic.

Legend for shapes: B batch, L length, D channels, N state, S segments, K chunks, P channel blocks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Warps of a program, one channel a thread: the kernels rely on 32 channels a warp.
WARPS = 4
# Tokens between two kept states; the memory they take is 4 N / CHUNK bytes for each of u's.
CHUNK = 32
# Programs that fill a multiprocessor well enough that cutting time costs more than it gains.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 3, 6

Gradients = tuple[
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
]


@dataclass(frozen=True)
class _Plan:
    """Sizes of one launch."""

    batch: int
    length: int
    channels: int
    n_state: int
    N: int
    blocks: int
    segments: int
    segment: int

    @property
    def chunks(self) -> int:
        return -(-self.length // CHUNK)

    @property
    def whole(self) -> bool:
        return self.length % CHUNK == 0


def _plan(u_BLD: Tensor, A_DN: Tensor, wanted: int, segments: int | None) -> _Plan:
    batch, length, channels = u_BLD.shape
    n_state = A_DN.shape[1]
    blocks = -(-channels // (32 * WARPS))
    if segments is None:
        programs = wanted * _multiprocessors(u_BLD.device)
        # Every segment is read twice, so only as many as fill the device.
        segments = max(1, min(programs // (blocks * batch), 16, length // (4 * CHUNK)))
    chunks = -(-length // CHUNK)
    segment = -(-chunks // segments) * CHUNK
    N = max(16, 1 << (n_state - 1).bit_length())
    return _Plan(batch, length, channels, n_state, N, blocks, -(-length // segment), segment)


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _states_first(tensor: Tensor) -> Tensor:
    """`[..., D, N]` as `[..., N, D]` in float32, so that a warp's reads are contiguous."""
    return tensor.float().transpose(-1, -2).contiguous()


def _float32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _contiguous_channels(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _pack(B_BLN: Tensor, C_BLN: Tensor, plan: _Plan) -> Tensor:
    from .triton_selective_forward import pack_projections

    rows, block = plan.batch * plan.length, 32
    packed = torch.empty((rows, 2, plan.N), dtype=torch.float32, device=B_BLN.device)
    pack_projections[(-(-rows // block),)](
        B_BLN,
        C_BLN,
        packed,
        *B_BLN.stride(),
        *C_BLN.stride(),
        plan.length,
        rows,
        plan.n_state,
        N=plan.N,
        R=block,
        num_warps=4,
    )
    return packed


def selective_scan_forward(
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor | None,
    delta_bias_D: Tensor | None,
    z_BLD: Tensor | None,
    initial_state_BDN: Tensor | None,
    seq_idx_BL: Tensor | None,
    *,
    delta_softplus: bool,
    save: bool,
    segments: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs in u's dtype, the final state `[B, D, N]` in float32, and what backward needs.

    Args:
        u_BLD, delta_BLD, z_BLD: any floating dtype, last dimension contiguous, else any strides.
        A_DN, D_D, delta_bias_D, initial_state_BDN: float32.
        B_BLN, C_BLN: any floating dtype and strides.
        z_BLD: the gate: y is multiplied by its silu, if given.
        seq_idx_BL: int32; the state starts from zero wherever it changes along a row.
        delta_softplus: whether delta, with the bias added, still goes through softplus.
        save: whether to keep the states `[B, K, N, D]` before every `CHUNK` tokens (else empty).
        segments: how many parts of the time run at once; by default what fills the device.
    """
    from .triton_selective_forward import scan_forward, segment_states

    plan = _plan(u_BLD, A_DN, FORWARD_PROGRAMS, segments)
    batch, length, channels, n_state = plan.batch, plan.length, plan.channels, plan.n_state
    A_ND = _states_first(A_DN)
    packed = _pack(B_BLN, C_BLN, plan)
    y_BLD = torch.empty((batch, length, channels), dtype=u_BLD.dtype, device=u_BLD.device)
    final_BND = _float32(u_BLD, batch, n_state, channels)
    kept = (batch, plan.chunks, n_state, channels) if save else (0,)
    checkpoints = _float32(u_BLD, *kept)
    local, decays = _segment_buffers(plan, u_BLD)
    flags = {
        "HAS_BIAS": delta_bias_D is not None,
        "HAS_SEQ": seq_idx_BL is not None,
        "SOFTPLUS": delta_softplus,
        "N": plan.N,
        "BD": 32 * WARPS,
        "T": _unroll(plan),
        "num_warps": WARPS,
        "maxnreg": _most_registers(plan),
    }
    u, delta = _contiguous_channels(u_BLD), _contiguous_channels(delta_BLD)
    z = u if z_BLD is None else _contiguous_channels(z_BLD)
    bias = A_ND if delta_bias_D is None else delta_bias_D.contiguous()
    skip = A_ND if D_D is None else D_D.contiguous()
    seq = A_ND if seq_idx_BL is None else seq_idx_BL.contiguous()
    initial = A_ND if initial_state_BDN is None else _states_first(initial_state_BDN)
    if plan.segments > 1:
        segment_states[(plan.blocks, batch, plan.segments - 1)](
            u,
            delta,
            A_ND,
            packed,
            bias,
            seq,
            local,
            decays,
            *u.stride()[:2],
            *delta.stride()[:2],
            seq.stride(0),
            length,
            channels,
            n_state,
            plan.segments,
            plan.segment,
            0,
            **flags,
        )
    scan_forward[(plan.blocks, batch, plan.segments)](
        u,
        delta,
        A_ND,
        packed,
        skip,
        bias,
        z,
        initial,
        seq,
        y_BLD,
        final_BND,
        checkpoints,
        local,
        decays,
        *u.stride()[:2],
        *delta.stride()[:2],
        *z.stride()[:2],
        seq.stride(0),
        length,
        channels,
        n_state,
        plan.segments,
        plan.segment,
        plan.chunks,
        0,
        HAS_D=D_D is not None,
        HAS_Z=z_BLD is not None,
        HAS_INITIAL=initial_state_BDN is not None,
        SAVE=save,
        WHOLE=plan.whole,
        CHUNK=CHUNK,
        **flags,
    )
    return y_BLD, final_BND.transpose(1, 2).contiguous(), checkpoints


def _unroll(plan: _Plan) -> int:
    return 2 if plan.N <= 32 else 1


def _most_registers(plan: _Plan) -> int | None:
    # Where 255 registers do not suffice, ptxas left to itself keeps 32 and spills all else.
    return 255 if plan.N > 16 else None


def _segment_buffers(plan: _Plan, like: Tensor) -> tuple[Tensor, Tensor]:
    shape = (plan.batch, plan.segments, plan.N, plan.channels) if plan.segments > 1 else (0,)
    local = torch.empty(shape, dtype=torch.float32, device=like.device)
    return local, torch.empty_like(local)


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
    z_BLD: Tensor | None,
    initial_state_BDN: Tensor | None,
    seq_idx_BL: Tensor | None,
    *,
    delta_softplus: bool,
    segments: int | None = None,
) -> Gradients:
    """The gradients of u, delta, A, B, C, D, delta_bias, z and the initial state, in that order.

    The arguments are the forward pass's, its `checkpoints`, and the gradients of its two results;
    that of the final state may be None, as are the gradients of what was None.
    """
    from .triton_selective_backward import scan_backward, segment_adjoints
    from .triton_selective_steps import interpreted
    from .triton_selective_sums import sum_blocks

    plan = _plan(u_BLD, A_DN, BACKWARD_PROGRAMS, segments)
    batch, length, channels, n_state = plan.batch, plan.length, plan.channels, plan.n_state
    A_ND = _states_first(A_DN)
    packed = _pack(B_BLN, C_BLN, plan)
    local, decays = _segment_buffers(plan, u_BLD)
    T = _unroll(plan)
    flags = {
        "HAS_BIAS": delta_bias_D is not None,
        "HAS_SEQ": seq_idx_BL is not None,
        "HAS_Z": z_BLD is not None,
        "WHOLE": plan.whole,
        "SOFTPLUS": delta_softplus,
        "N": plan.N,
        "BD": 32 * WARPS,
        "T": T,
        "num_warps": WARPS,
        "maxnreg": _most_registers(plan),
    }
    u, delta = _contiguous_channels(u_BLD), _contiguous_channels(delta_BLD)
    dy = _contiguous_channels(dy_BLD)
    z = u if z_BLD is None else _contiguous_channels(z_BLD)
    bias = A_ND if delta_bias_D is None else delta_bias_D.contiguous()
    skip = A_ND if D_D is None else D_D.contiguous()
    seq = A_ND if seq_idx_BL is None else seq_idx_BL.contiguous()
    dfinal = A_ND if dfinal_BDN is None else _states_first(dfinal_BDN)
    shape, dev = (batch, length, channels), u.device
    du = torch.empty(shape, dtype=u.dtype, device=dev)
    ddelta = torch.empty(shape, dtype=delta.dtype, device=dev)
    dz = None if z_BLD is None else torch.empty(shape, dtype=z.dtype, device=dev)
    dinitial = None if initial_state_BDN is None else _float32(u_BLD, batch, n_state, channels)
    rows = batch * plan.segments
    dA = _float32(u_BLD, rows, n_state, channels)
    dD = _float32(u_BLD, rows, channels)
    dbias = _float32(u_BLD, rows, channels)
    assembly = not interpreted()
    parts = plan.blocks * (WARPS if assembly else 1)
    partial = _float32(u_BLD, parts, batch * length, 2, plan.N)
    scratch = _float32(u_BLD, rows * plan.blocks, CHUNK // T, plan.N, 32 * WARPS)
    if plan.segments > 1:
        segment_adjoints[(plan.blocks, batch, plan.segments - 1)](
            dy,
            delta,
            A_ND,
            packed,
            bias,
            z,
            seq,
            local,
            decays,
            *dy.stride()[:2],
            *delta.stride()[:2],
            *z.stride()[:2],
            seq.stride(0),
            length,
            channels,
            n_state,
            plan.segments,
            plan.segment,
            0,
            **flags,
        )
    scan_backward[(plan.blocks, batch, plan.segments)](
        dy,
        dfinal,
        u,
        delta,
        A_ND,
        packed,
        skip,
        bias,
        z,
        seq,
        checkpoints,
        scratch,
        local,
        decays,
        du,
        ddelta,
        du if dz is None else dz,
        dA if dinitial is None else dinitial,
        dA,
        dD,
        dbias,
        partial,
        *dy.stride()[:2],
        *u.stride()[:2],
        *delta.stride()[:2],
        *z.stride()[:2],
        seq.stride(0),
        length,
        channels,
        n_state,
        plan.segments,
        plan.segment,
        plan.chunks,
        0,
        HAS_D=D_D is not None,
        HAS_INITIAL=dinitial is not None,
        HAS_DFINAL=dfinal_BDN is not None,
        ASSEMBLY=assembly,
        EXACT=torch.float32 in (u.dtype, B_BLN.dtype),
        CHUNK=CHUNK,
        **flags,
    )
    dB = torch.empty((batch, length, n_state), dtype=B_BLN.dtype, device=dev)
    dC = torch.empty((batch, length, n_state), dtype=C_BLN.dtype, device=dev)
    sum_blocks[(-(-batch * length // 16),)](
        partial, dB, dC, batch * length, n_state, parts, N=plan.N, R=16, UNROLL=8, num_warps=4
    )
    return (
        du,
        ddelta,
        dA.sum(0).t().contiguous(),
        dB,
        dC,
        None if D_D is None else dD.sum(0),
        None if delta_bias_D is None else dbias.sum(0),
        dz,
        None if dinitial is None else dinitial.transpose(1, 2).contiguous(),
    )
