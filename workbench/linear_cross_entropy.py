"""Cross entropy of a linear head without ever holding all logits.

The logits of 32,768 tokens over 50,280 entries are 6.6 GB in float32, and their gradient as much
again. Here a chunk of tokens at a time goes through the head, the loss and back: a forward pass
computes the gradients too, and the backward pass only scales them. Three matrix products, as
ever; nothing is computed twice. (The idea of Liger kernel, arXiv:2410.10989.)

Shape suffixes: N tokens, D d_model, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from workbench.kernels import TORCH, Backend, Operation, choose

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
        # Within a Function it no longer shows whether gradients are recorded.
        wanted = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
        arguments = (hidden_ND, weight_VD, targets_N, scaling, ignore_index, chunk, wanted)
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
        wanted: bool,
    ) -> Tensor:
        cross_entropy = _function(cross_entropy_backend(hidden_ND.device.type), hidden_ND.is_cuda)
        product_VD = weight_VD.to(hidden_ND.dtype)
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        dhidden_ND = torch.empty_like(hidden_ND) if wanted else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wanted else None
        for begin in range(0, len(hidden_ND), chunk):
            rows = slice(begin, begin + chunk)
            hidden_CD, targets_C = hidden_ND[rows], targets_N[rows]
            logits_CV = hidden_CD @ product_VD.t()
            loss, dlogits_CV = cross_entropy(logits_CV, targets_C, scaling, ignore_index, wanted)
            total += loss
            if dhidden_ND is not None and dweight_VD is not None:
                torch.mm(dlogits_CV, product_VD, out=dhidden_ND[rows])
                _add_product(dweight_VD, dlogits_CV, hidden_CD)
            del logits_CV, dlogits_CV  # before the next chunk's are made
        ctx.save_for_backward(dhidden_ND, dweight_VD)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        dhidden_ND, dweight_VD = ctx.saved_tensors
        return (dhidden_ND * scale).to(dhidden_ND.dtype), dweight_VD * scale, *(None,) * 5


def _add_product(dweight_VD: Tensor, dlogits_CV: Tensor, hidden_CD: Tensor) -> None:
    """`dweight += dlogitsᵀ hidden`, the product kept in float32."""
    if dlogits_CV.is_cuda and dlogits_CV.dtype != torch.float32:
        product = (dweight_VD, dlogits_CV.t(), hidden_CD)
        torch.addmm(*product, out_dtype=torch.float32, out=dweight_VD)  # adds up in place
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


def cross_entropy_backend(device_type: str) -> str:
    """What the loss of a chunk of logits, and its gradient, are computed with."""
    return choose("cross_entropy", ("triton",)) if device_type == "cuda" else TORCH


@lru_cache
def _function(backend: str, compiled: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """What gives the sum of a chunk's losses and, if wanted, its gradients by the logits.

    Torch's way is, on a CUDA device, fused into one pass over the logits for each of the two;
    Triton's reads them once and leaves the gradients in their place.
    """
    if backend != TORCH:
        return _in_place
    if not compiled:
        return partial(_apart, _losses, _gradients)
    losses = torch.compile(_losses, dynamic=False)
    return partial(_apart, losses, torch.compile(_gradients, dynamic=False))


def _apart(
    losses: Callable[..., tuple[Tensor, Tensor]],
    gradients: Callable[..., Tensor],
    logits_CV: Tensor,
    targets_C: Tensor,
    scaling: float,
    ignore_index: int,
    wanted: bool,
) -> tuple[Tensor, Tensor]:
    log_sum_C, loss = losses(logits_CV, targets_C, scaling, ignore_index)
    if not wanted:
        return loss, logits_CV
    return loss, gradients(logits_CV, log_sum_C, targets_C, scaling, ignore_index)


def _in_place(
    logits_CV: Tensor, targets_C: Tensor, scaling: float, ignore_index: int, wanted: bool
) -> tuple[Tensor, Tensor]:
    from workbench.triton_cross_entropy import cross_entropy

    losses_C = cross_entropy(logits_CV, targets_C, scaling, ignore_index, wanted)
    return losses_C.sum(), logits_CV


def _probe() -> None:
    """Run the kernel, and hold it against torch's."""
    generator = torch.Generator("cuda").manual_seed(0)
    for tokens, entries in ((3, 17), (5, 9001)):
        logits_CV = 4 * torch.randn(tokens, entries, device="cuda", generator=generator).bfloat16()
        targets_C = torch.randint(entries, (tokens,), device="cuda", generator=generator)
        targets_C[1] = -100
        log_sum_C, wanted = _losses(logits_CV, targets_C, 2.0, -100)
        gradients_CV = _gradients(logits_CV, log_sum_C, targets_C, 2.0, -100)
        found, logits_CV = _in_place(logits_CV, targets_C, 2.0, -100, True)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(logits_CV, gradients_CV, rtol=2e-2, atol=1e-4)


CROSS_ENTROPY = Operation(
    "cross_entropy",
    [Backend(name="triton", probe=_probe, install="pip install triton")],
    home=__name__,
)
