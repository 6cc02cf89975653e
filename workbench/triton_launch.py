# mypy: ignore-errors
"""Kernels that start before the one ahead of them has ended (programmatic dependent launch).

A decode step is a chain of kernels of microseconds each, and between two of them a device is idle
for about one. A kernel that is launched with `launch_pdl` may begin once every program of the
kernel ahead has called `let_next_start`; what that one wrote may be read after `wait_for_previous`
alone, and nothing may be written before. Every program must wait before it ends: what a kernel
further on finds is then complete, too. Only what no kernel of such a chain writes may be read
before the wait: parameters. (A kernel that does not call `let_next_start`, as torch's own, holds
back the next one until it has ended, so that whoever changes a parameter by one is safe.)

Needs triton, and a device of compute capability 9 or more; elsewhere kernels go one after another.
https://docs.nvidia.com/cuda/cuda-c-programming-guide/#programmatic-dependent-launch-and-synchronization
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor


def may_overlap(tensor: Tensor) -> bool:
    """Whether the device of a tensor can start a kernel early."""
    return tensor.is_cuda and torch.version.hip is None and _capability(tensor.device)[0] >= 9


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@triton.jit
def let_next_start(OVERLAP: tl.constexpr):
    """The kernel launched next may begin, up to where it waits for this one."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """From here on everything that earlier kernels wrote is there."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
