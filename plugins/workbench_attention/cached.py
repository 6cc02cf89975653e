"""A decode step of attention on caches whose length the device alone knows, as a torch operator.

Shape suffixes: B batch, H query heads, K key-value heads, L slots, P head dim.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

# A copy that travels with an exported model has operators of its own.
NAMESPACE = __name__.replace(".", "_")


@torch.library.custom_op(
    f"{NAMESPACE}::cached_attention", mutates_args=("keys_BKLP", "values_BKLP")
)
def cached_attention(
    q_B1HP: Tensor,
    k_B1KP: Tensor,
    v_B1KP: Tensor,
    keys_BKLP: Tensor,
    values_BKLP: Tensor,
    position: Tensor,
    scale: float,
    backend: str,
) -> Tensor:
    """Put a token into the caches, and attend to all in them.

    Reads only the slots that are filled, which the device alone knows.

    Args:
        position: 0-dim int64, tokens given before this one.
        backend: `"triton"`, whose token p goes to slot p modulo L, or `"flash-attn"`, which must
            have room for it.

    Returns:
        `[B, 1, H, P]`.
    """
    caches = keys_BKLP, values_BKLP
    if backend == "triton":
        from workbench_attention.triton_decode import decode_attention

        token = (tensor.squeeze(1) for tensor in (q_B1HP, k_B1KP, v_B1KP))
        return decode_attention(*token, *caches, position, scale).unsqueeze(1)
    lengths_B = position.to(torch.int32).expand(len(q_B1HP)).contiguous()
    return import_module("flash_attn").flash_attn_with_kvcache(  # type: ignore[no-any-return]
        q_B1HP,
        *(cache.transpose(1, 2) for cache in caches),
        k=k_B1KP,
        v=v_B1KP,
        cache_seqlens=lengths_B,
        softmax_scale=scale,
        causal=True,
    )


@cached_attention.register_fake
def _(
    q_B1HP: Tensor,
    k_B1KP: Tensor,
    v_B1KP: Tensor,
    keys_BKLP: Tensor,
    values_BKLP: Tensor,
    position: Tensor,
    scale: float,
    backend: str,
) -> Tensor:
    return torch.empty_like(q_B1HP, memory_format=torch.contiguous_format)
