"""How the selective scan's kernels are launched: sizes, segments, and what all of them read.

Legend for shapes: B batch, L length, D channels, N state, S segments, K chunks, P channel blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Channels of a program, which is one warp: two lanes share a channel's states, as the backward
# pass's sums over channels want it.
CHANNELS = 16
# Tokens of a loop's body, and from one kept state to the next. With fewer, each body waits as long
# for its own first results; with more, inputs and states no longer fit the registers.
CHUNK = 4
# Most registers of a lane, so that 3 warps fit a multiprocessor's quarter.
REGISTERS = 168
# Programs that fill a multiprocessor well enough that cutting time costs more than it gains.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 8, 10
# Tokens that a segment has at the least.
LEAST_SEGMENT = 128


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the kept states: half as wide where the activations are, but with float32's range."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


@dataclass(frozen=True)
class Plan:
    """Sizes of one launch."""

    batch: int
    length: int
    channels: int
    n_state: int
    N: int
    segments: int
    segment: int

    @property
    def blocks(self) -> int:
        return -(-self.channels // CHANNELS)

    @property
    def chunks(self) -> int:
        return -(-self.length // CHUNK)

    @property
    def registers(self) -> int | None:
        """Most registers of a lane; None for the compiler's choice."""
        return REGISTERS if self.N <= 16 else None

    @property
    def constants(self) -> dict[str, Any]:
        """What every kernel takes as constants."""
        return {
            "D_SIZE": self.channels,
            "N_SIZE": self.n_state,
            "WHOLE": self.length % CHUNK == 0,
            "EVEN": self.channels % CHANNELS == 0,
            "N": self.N,
            "BD": CHANNELS,
            "num_warps": 1,
        }


@dataclass(frozen=True)
class Inputs:
    """What both passes read, laid out as the kernels want it."""

    plan: Plan
    u: Tensor
    delta: Tensor
    A_ND: Tensor
    packed: Tensor
    skip_D: Tensor | None
    bias_D: Tensor | None
    seq_BL: Tensor | None
    softplus: bool

    @property
    def seq_stride(self) -> int:
        return 0 if self.seq_BL is None else self.seq_BL.stride(0)

    @property
    def constants(self) -> dict[str, Any]:
        """Those of every kernel that goes through time."""
        from .triton_selective_steps import interpreted

        return {
            **self.plan.constants,
            "HAS_BIAS": self.bias_D is not None,
            "HAS_SEQ": self.seq_BL is not None,
            "SOFTPLUS": self.softplus,
            "ASSEMBLY": not interpreted(),
            "CHUNK": CHUNK,
            "maxnreg": self.plan.registers,
            "DELTA_ROW": self.delta.stride(1),
        }


def plan_forward(u_BLD: Tensor, n_state: int, segments: int | None) -> Plan:
    """Sizes of a launch in `segments` parts of the time, by default as many as fill the device."""
    return _plan(u_BLD, n_state, FORWARD_PROGRAMS, segments)


def plan_backward(u_BLD: Tensor, n_state: int, segments: int | None) -> Plan:
    """The same for the backward pass."""
    return _plan(u_BLD, n_state, BACKWARD_PROGRAMS, segments)


def _plan(u_BLD: Tensor, n_state: int, programs: int, segments: int | None) -> Plan:
    batch, length, channels = u_BLD.shape
    if segments is None:
        wanted = programs * multiprocessors(u_BLD.device)
        at_once = batch * -(-channels // CHANNELS)
        # Every segment is read twice, so only as many as fill the device.
        segments = max(1, min(wanted // at_once, 16, length // LEAST_SEGMENT))
    chunks = -(-length // CHUNK)
    segment = -(-chunks // segments) * CHUNK
    N = max(16, 1 << (n_state - 1).bit_length())
    return Plan(batch, length, channels, n_state, N, -(-length // segment), segment)


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def prepare(
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor | None,
    delta_bias_D: Tensor | None,
    seq_idx_BL: Tensor | None,
    plan: Plan,
    softplus: bool,
) -> Inputs:
    """The scan's arguments as the kernels read them."""
    return Inputs(
        plan,
        contiguous_channels(u_BLD),
        contiguous_channels(delta_BLD),
        states_first(A_DN),
        _pack(B_BLN, C_BLN, plan),
        None if D_D is None else D_D.contiguous(),
        None if delta_bias_D is None else delta_bias_D.contiguous(),
        None if seq_idx_BL is None else seq_idx_BL.contiguous(),
        softplus,
    )


def states_first(tensor: Tensor) -> Tensor:
    """`[..., D, N]` as `[..., N, D]` in float32, so that a warp's reads are contiguous."""
    return tensor.float().transpose(-1, -2).contiguous()


def contiguous_channels(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def float32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def segment_buffers(plan: Plan, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Where segments leave their states (or adjoints) and decays, `[B, S, N, D]`."""
    if plan.segments == 1:
        return None, None
    shape = (plan.batch, plan.segments, plan.N, plan.channels)
    return float32(like, *shape), float32(like, *shape)


def _pack(B_BLN: Tensor, C_BLN: Tensor, plan: Plan) -> Tensor:
    from .triton_selective_forward import pack_projections

    rows, block = plan.batch * plan.length, 32
    padded = rows + 2 * CHUNK  # what loops fetch ahead, of a last chunk that is not whole
    packed = torch.empty((padded, plan.N), dtype=torch.int64, device=B_BLN.device)
    pack_projections[(-(-padded // block),)](
        *(B_BLN, C_BLN, packed, *B_BLN.stride(), *C_BLN.stride(), plan.length),
        *(rows, padded, plan.n_state, plan.N, block),
        num_warps=4,
    )
    return packed
