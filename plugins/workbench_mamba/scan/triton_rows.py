"""What Triton kernels ask of tensors that are slices of longer rows."""

from __future__ import annotations

from torch import Tensor


def row_stride(tensor: Tensor) -> int:
    """Numbers from one token to the next, in a tensor that is a slice of one whole `[..., R]`.

    Kernels take it as a constant: only then are loads known to be aligned, and 16 bytes wide.
    """
    stride = tensor.stride(-2)
    if tensor.stride(-1) != 1 or (tensor.ndim == 3 and tensor.stride(0) != len(tensor[0]) * stride):
        raise ValueError(f"a slice of the last dimension is wanted, got strides {tensor.stride()}")
    return stride
