"""Which key each query sees, and ALiBi's bias on it.

Keys are the tokens remembered from earlier calls, then those of this call, in order.

Shape suffixes: B batch (1 where all rows agree), T queries of this call, S keys, H query heads.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from workbench.layer import Context


def visibility(
    num_queries: int,
    context: Context,
    *,
    window: int | None = None,
    past_visible_BS: Tensor | None = None,
    past_document_B: Tensor | None = None,
    num_past: int = 0,
    device: torch.device,
) -> Tensor:
    """True where query t may see key s, `[B, 1, T, S]`.

    Every query sees itself, padding too: a softmax over nothing would be NaN.

    Args:
        window: a token sees itself and `window - 1` tokens before it; None for all.
        past_visible_BS: remembered keys that are real and of the last document; None for all.
        past_document_B: which document that was; None for document 0.
        num_past: how many keys are remembered.
    """
    distance_TS = distances(num_queries, num_past, device)
    seen = (distance_TS >= 0)[None]
    if context.prefix_lengths_B is not None:
        seen = seen | _in_prefix(num_queries, context)[:, None]
    if window is not None:
        seen = seen & (distance_TS.abs() < window)
    real_BS = _real_keys(num_queries, num_past, context, past_visible_BS)
    if real_BS is not None:
        seen = seen & real_BS[:, None]
    if context.seq_idx_BT is not None:
        seen = seen & _same_document(context.seq_idx_BT, past_document_B, num_past)
    return (seen | (distance_TS == 0))[:, None]


def distances(num_queries: int, num_past: int, device: torch.device) -> Tensor:
    """How many tokens each key lies before each query, `[T, S]`; negative for later ones."""
    queries_T1 = torch.arange(num_past, num_past + num_queries, device=device)[:, None]
    return queries_T1 - torch.arange(num_past + num_queries, device=device)


def alibi_slopes(num_heads: int, like: Tensor) -> Tensor:
    """Slopes `[H]` of ALiBi (arXiv:2108.12409) on the device and in the dtype of `like`.

    For a head count between two powers of two: those of the lower power, then every other one of
    the higher power, as published and as in BLOOM.
    """
    if torch.compiler.is_compiling():
        return torch.tensor(_slopes(num_heads), device=like.device, dtype=like.dtype)
    return _slope_tensor(num_heads, like.device, like.dtype)


def with_alibi(seen_B1TS: Tensor, distance_TS: Tensor, slopes_H: Tensor) -> Tensor:
    """Additive mask `[B, H, T, S]`: -slope · distance where seen, -inf elsewhere.

    The distance counts both ways, so that a prefix seen in both directions is biased evenly.
    """
    bias_HTS = -slopes_H[:, None, None] * distance_TS.abs()
    return bias_HTS.masked_fill(~seen_B1TS, -math.inf)


def _in_prefix(num_queries: int, context: Context) -> Tensor:
    """Which keys belong to their row's prefix, `[B, S]`; padding is not counted."""
    assert context.prefix_lengths_B is not None
    lengths_B1 = context.prefix_lengths_B[:, None]
    if context.attention_mask_BT is None:
        return torch.arange(num_queries, device=lengths_B1.device) < lengths_B1
    return context.attention_mask_BT.cumsum(dim=-1) <= lengths_B1


def _real_keys(
    num_queries: int, num_past: int, context: Context, past_visible_BS: Tensor | None
) -> Tensor | None:
    """Keys that are no padding, `[B, S]`; None for all."""
    mask_BT = context.attention_mask_BT
    if mask_BT is None and past_visible_BS is None:
        return None
    if mask_BT is None:
        assert past_visible_BS is not None
        mask_BT = past_visible_BS.new_ones(past_visible_BS.shape[0], num_queries)
    if num_past == 0:
        return mask_BT
    if past_visible_BS is None:
        past_visible_BS = mask_BT.new_ones(mask_BT.shape[0], num_past)
    return torch.cat((past_visible_BS, mask_BT), dim=-1)


def _same_document(document_BT: Tensor, past_document_B: Tensor | None, num_past: int) -> Tensor:
    """Whether query and key are of one document, `[B, T, S]`."""
    document_BS = document_BT
    if num_past:
        if past_document_B is None:
            past_document_B = torch.zeros_like(document_BT[:, 0])
        past_BS = past_document_B[:, None].expand(-1, num_past)
        document_BS = torch.cat((past_BS.to(document_BT.dtype), document_BT), dim=-1)
    return document_BT[:, :, None] == document_BS[:, None]


def _slopes(num_heads: int) -> list[float]:
    lower = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (head + 1) / lower) for head in range(lower)]
    return slopes + [2.0 ** (-4.0 * (2 * i + 1) / lower) for i in range(num_heads - lower)]


@lru_cache(maxsize=32)
def _slope_tensor(num_heads: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(_slopes(num_heads), device=device, dtype=dtype)
