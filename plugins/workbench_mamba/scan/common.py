"""What every scan here needs: the working precision, autocast switched off, document borders.

Legend for shapes: B batch, L length, D channels, H heads, P head dim, G groups, N state, W width.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from math import e, log2, prod

import torch
from torch import Tensor
from torch.nn import Parameter

# Decays are powers of two, of exponents scaled by this: on a CPU torch.exp takes 20 to 100 times
# longer for -inf and for results that underflow, which masks and strong decays are full of.
LOG2_E = log2(e)

# The largest scratch buffer, in bytes, that a thread keeps between calls.
KEPT_BYTES = 1 << 22

_thread = threading.local()


def working_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that a recurrence on `tensor` runs in: float64 stays, all else is float32.

    A decay of 0.999 a step rounds to 1 in bfloat16, so half precision would never forget.
    """
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which matmuls keep the dtype of their operands, on the device of `tensor`."""
    if tensor.is_meta:  # has none; torch.amp is not asked: in torch 2.11 that breaks the graph
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def documents(seq_idx_BL: Tensor) -> Tensor:
    """Number each row's documents 0, 1, 2, ... in order of appearance: int64 `[B, L]`.

    A document begins wherever `seq_idx` differs from its left neighbour, so an id that comes
    back later (two rows of a packer glued together) still counts as a new document.
    """
    borders_BL = torch.zeros_like(seq_idx_BL, dtype=torch.int64)
    borders_BL[:, 1:] = seq_idx_BL[:, 1:] != seq_idx_BL[:, :-1]
    return borders_BL.cumsum(1)


def require(name: str, tensor: Tensor, shape: Iterable[int]) -> None:
    """Raise ValueError, naming the argument, unless `tensor` has exactly this shape."""
    expected = tuple(shape)
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")


def require_tokens(length: int, chunk_size: int) -> None:
    """Raise ValueError for an empty sequence or a chunk size that is not positive."""
    if length < 1:
        raise ValueError("the sequence is empty: a scan needs at least one token")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1")


def row_blocks(batch: int, size: int, device: torch.device) -> Iterator[slice]:
    """Cut a batch into blocks of `size` rows (at least one) for a CPU's cache.

    Any other device gets the batch whole: it wants few and large operations.
    """
    size = max(1, size) if device.type == "cpu" else batch
    for begin in range(0, batch, size):
        yield slice(begin, min(begin + size, batch))


def forbid_double_backward(reference: str) -> None:
    """Raise if the backward pass under way is itself being recorded.

    `once_differentiable` would let it pass whenever the output's gradient is a constant, and then
    return wrong second derivatives.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"this can be differentiated only once, so not with create_graph=True: use {reference}"
        )


class Workspace:
    """Named buffers for one call, which serve each of its blocks in turn.

    The system hands out large fresh memory page by page, at the first touch of each; that costs
    several times what a pass of arithmetic over the same numbers does. So on a CPU, buffers of up
    to KEPT_BYTES stay with their thread for its later calls: a few dozen MB at most. Nothing
    outside a call may therefore hold on to what was taken.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._own: dict[tuple[str, torch.dtype], Tensor] = {}
        # Subclasses stand for tensors of another kind (tracing, sharding): nothing to share.
        is_plain = type(like) in (Tensor, Parameter) and like.device.type == "cpu"
        # A compiled graph cannot write to what outlives it, and manages its memory itself.
        keeps = is_plain and not torch.compiler.is_compiling()
        self._kept = _kept_buffers() if keeps else self._own

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised contiguous tensor; what was taken under this name before is gone."""
        size, dtype = prod(shape), dtype or self._like.dtype
        buffers = self._kept if size * dtype.itemsize <= KEPT_BYTES else self._own
        buffer = buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            # A tensor made in inference mode could not be written outside it later.
            with torch.inference_mode(False):
                buffer = torch.empty(size, dtype=dtype, device=self._like.device)
            buffers[name, dtype] = buffer
        return buffer[:size].view(shape)


def _kept_buffers() -> dict[tuple[str, torch.dtype], Tensor]:
    if not hasattr(_thread, "buffers"):
        _thread.buffers = {}
    buffers: dict[tuple[str, torch.dtype], Tensor] = _thread.buffers
    return buffers
