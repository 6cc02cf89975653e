"""Rotary position embedding (arXiv:2104.09864) in the rotate-half convention of GPT-NeoX and Llama.

Channel i turns with channel i + R/2 by the angle position · theta^(-2i/R); channels from R on stay.
The tables are kept a process and not in buffers: every attention layer of a model turns by the
same angles, and a buffer left out of the checkpoint would come back as garbage from a reload that
builds on the meta device.

Shape suffixes: B batch, T tokens in this call, H heads, P head dim, R rotary channels (R <= P).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def rotary_tables(
    start: int | Tensor, length: int, channels: int, theta: float, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines, `[T, 1, R]`, of the positions from `start` on.

    Args:
        start: a tensor (0-dim, on the device of `like`) where only the device knows it.
        channels: R, even.
        theta: base of the frequencies.
        like: a tensor of the wanted device and dtype.
    """
    if torch.compiler.is_compiling() or isinstance(start, Tensor):
        # A tracer must see the computation; a table from outside would be baked in at its length.
        cos_T1R, sin_T1R = _compute(start, length, channels, theta, like.device, like.dtype)
        return cos_T1R, sin_T1R
    rows = 1 << (start + length - 1).bit_length()
    cos_T1R, sin_T1R = _table(rows, channels, theta, like.device, like.dtype)
    return cos_T1R[start : start + length], sin_T1R[start : start + length]


def rotate(x_BTHP: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
    """`x_BTHP` with its first R channels turned."""
    channels = cos_T1R.shape[-1]
    turned_BTHR = x_BTHP[..., :channels]
    swapped_BTHR = turned_BTHR.roll(channels // 2, -1)
    turned_BTHR = torch.addcmul(turned_BTHR * cos_T1R, swapped_BTHR, sin_T1R)
    if channels == x_BTHP.shape[-1]:
        return turned_BTHR
    return torch.cat((turned_BTHR, x_BTHP[..., channels:]), dim=-1)


@lru_cache(maxsize=16)
def _table(
    rows: int, channels: int, theta: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    # Filled in generation, read in training: an inference tensor cannot be saved for backward.
    with torch.inference_mode(False):
        return _compute(0, rows, channels, theta, device, dtype)


def _compute(
    start: int | Tensor,
    length: int,
    channels: int,
    theta: float,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    # A position times a frequency in bfloat16 would be wrong by whole turns.
    wide = torch.promote_types(dtype, torch.float32)
    steps = torch.arange(0, channels, 2, device=device, dtype=wide)
    frequencies = 1.0 / theta ** (steps / channels)
    positions_T1 = (start + torch.arange(length, device=device))[:, None]
    angles_TR = (positions_T1 * frequencies).repeat(1, 2)
    sign = torch.ones(channels, device=device, dtype=wide)
    sign[: channels // 2] = -1.0
    cos_TR, sin_TR = angles_TR.cos(), angles_TR.sin() * sign
    return cos_TR[:, None].to(dtype), sin_TR[:, None].to(dtype)
