"""The short convolution on a CUDA device: causal-conv1d's kernel, else torch.

Shape suffixes: B batch, L length, C channels, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.kernels import TORCH, Backend, Operation, choose
from workbench_mamba.scan import causal_conv1d as torch_causal_conv1d
from workbench_mamba.scan import last_inputs

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
    from workbench_mamba.kernels.convolution_operators import conv_forward

    nothing_BCW = x_BLC.new_zeros((x_BLC.shape[0], *weight_CW.shape))
    y_BLC = conv_forward(x_BLC, weight_CW, bias_C, seq_idx_BL)
    return y_BLC, last_inputs(x_BLC, nothing_BCW, seq_idx_BL)


def _probe() -> None:
    from workbench_mamba.kernels.convolution_operators import conv_forward

    x_BLC = torch.zeros(1, 8, 8, device="cuda", dtype=torch.bfloat16)
    conv_forward(x_BLC, torch.zeros(8, 4, device="cuda"), None, None)


CONV = Operation(
    "causal_conv1d",
    [
        Backend(
            name="causal-conv1d",
            probe=_probe,
            install="pip install --no-build-isolation causal-conv1d",
        )
    ],
    home=__name__,
)
