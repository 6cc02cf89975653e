"""Cross entropy of a linear head without ever holding all logits.

The logits of 32,768 tokens over 50,280 entries are 6.6 GB in float32, and their gradient as much
again. Here a chunk of tokens at a time goes through the head, the loss and back: a forward pass
computes the gradients too, and the backward pass only scales them. Three matrix products, as
ever; nothing is computed twice. (The idea of Liger kernel, arXiv:2410.10989.)

Shape suffixes: N tokens, D d_model, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**28  # logits held at once: 512 MiB in bfloat16


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    scaling: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk: int | None = None,
) -> Tensor:
    """`cross_entropy(linear(hidden, weight) / scaling, targets)`, a scalar in float32.

    Args:
        hidden_ND: under autocast, products run in its dtype; sums run in float32 always.
        scaling: what logits are divided by.
        reduction: `"mean"` over the targets that are not `ignore_index`, or `"sum"`.
        chunk: tokens whose logits are held at once; None for about `CHUNK_ELEMENTS` logits.

    Raises:
        ValueError: an unknown reduction.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction is {reduction!r}, expected "mean" or "sum"')
    if torch.is_autocast_enabled(hidden_ND.device.type):
        dtype = torch.get_autocast_dtype(hidden_ND.device.type)
        hidden_ND = hidden_ND.to(dtype)
    chunk = chunk or max(1, CHUNK_ELEMENTS // len(weight_VD))
    with torch.autocast(hidden_ND.device.type, enabled=False):
        arguments = (hidden_ND, weight_VD, targets_N, scaling, ignore_index, chunk)
        total: Tensor = _Chunked.apply(*arguments)  # type: ignore[no-untyped-call]
    if reduction == "sum":
        return total
    return total / (targets_N != ignore_index).sum()


class _Chunked(torch.autograd.Function):
    """The sum of the losses of all tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        scaling: float,
        ignore_index: int,
        chunk: int,
    ) -> Tensor:
        losses, gradients = _functions(hidden_ND.is_cuda)
        product_VD = weight_VD.to(hidden_ND.dtype)
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        wanted = any(ctx.needs_input_grad[:2])
        dhidden_ND = torch.empty_like(hidden_ND) if wanted else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wanted else None
        for begin in range(0, len(hidden_ND), chunk):
            rows = slice(begin, begin + chunk)
            hidden_CD, targets_C = hidden_ND[rows], targets_N[rows]
            logits_CV = hidden_CD @ product_VD.t()
            log_sum_C, loss = losses(logits_CV, targets_C, scaling, ignore_index)
            total += loss
            if dhidden_ND is not None and dweight_VD is not None:
                dlogits_CV = gradients(logits_CV, log_sum_C, targets_C, scaling, ignore_index)
                del logits_CV
                torch.mm(dlogits_CV, product_VD, out=dhidden_ND[rows])
                _add_product(dweight_VD, dlogits_CV, hidden_CD)
        ctx.save_for_backward(dhidden_ND, dweight_VD)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        dhidden_ND, dweight_VD = ctx.saved_tensors
        return (dhidden_ND * scale).to(dhidden_ND.dtype), dweight_VD * scale, None, None, None, None


def _add_product(dweight_VD: Tensor, dlogits_CV: Tensor, hidden_CD: Tensor) -> None:
    """`dweight += dlogitsᵀ hidden`, the product kept in float32."""
    if dlogits_CV.is_cuda and dlogits_CV.dtype != torch.float32:
        dweight_VD += torch.mm(dlogits_CV.t(), hidden_CD, out_dtype=torch.float32)
    else:
        dweight_VD += dlogits_CV.t() @ hidden_CD


def _losses(
    logits_CV: Tensor, targets_C: Tensor, scaling: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of each token's logits, and the sum of the losses."""
    scores_CV = logits_CV.float() / scaling
    log_sum_C = scores_CV.logsumexp(-1)
    is_real_C = targets_C != ignore_index
    chosen_C = scores_CV.gather(1, targets_C.clamp_min(0)[:, None])[:, 0]
    return log_sum_C, torch.where(is_real_C, log_sum_C - chosen_C, 0.0).sum()


def _gradients(
    logits_CV: Tensor, log_sum_C: Tensor, targets_C: Tensor, scaling: float, ignore_index: int
) -> Tensor:
    """Of the sum of losses, by the logits, in their dtype."""
    probabilities_CV = (logits_CV.float() / scaling - log_sum_C[:, None]).exp()
    entries_V = torch.arange(logits_CV.shape[1], device=logits_CV.device)
    is_target_CV = entries_V == targets_C[:, None]
    gradient_CV = (probabilities_CV - is_target_CV.float()) / scaling
    is_real_C1 = (targets_C != ignore_index)[:, None]
    return torch.where(is_real_C1, gradient_CV, 0.0).to(logits_CV.dtype)


@lru_cache
def _functions(compiled: bool) -> tuple[Any, Any]:
    """`_losses` and `_gradients`, on a CUDA device each fused into one pass over the logits."""
    if not compiled:
        return _losses, _gradients
    return torch.compile(_losses, dynamic=False), torch.compile(_gradients, dynamic=False)
