"""Mamba's operations as one call each: on fused CUDA kernels where they work, else on torch.

The kernels are torch custom operators, so torch.compile goes around them without a graph break.
They, and the libraries behind them, are imported at the first call on a CUDA device.
"""

from workbench_mamba.kernels.convolution import causal_conv1d, conv_backend
from workbench_mamba.kernels.selective import scan_backend, selective_scan
from workbench_mamba.kernels.state_space import ssd, ssd_backend

__all__ = [
    "causal_conv1d",
    "conv_backend",
    "scan_backend",
    "selective_scan",
    "ssd",
    "ssd_backend",
]
