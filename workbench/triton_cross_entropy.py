# mypy: ignore-errors
"""The cross entropy of rows of logits and its gradient as one Triton kernel.

A program takes one row, twice: for the logarithm of its sum of exponentials, and for the gradient,
which is written in place. The second time its logits come from the cache.
Needs triton; a plain function, no autograd, no wait for the device.
Shape suffixes: C tokens, V vocabulary; in kernels, K entries of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ENTRIES, WARPS, STAGES = 8192, 8, 3  # of a program
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def cross_entropy(
    logits_CV: Tensor, targets_C: Tensor, scaling: float, ignore_index: int, gradients: bool
) -> Tensor:
    """Each token's cross entropy of `logits / scaling`, `[C]` in float32; 0 where it is ignored.

    Args:
        logits_CV: overwritten with the gradients of the sum of the losses, if `gradients`; the
            last dimension contiguous.
        targets_C: integers below V, or `ignore_index`. The loss of any other is not a number.
    """
    losses_C = targets_C.new_empty(targets_C.shape, dtype=torch.float32)
    rows, entries = logits_CV.shape
    if rows:
        cross_entropy_kernel[(rows,)](
            *(logits_CV, targets_C.contiguous(), losses_C, ignore_index, 1.0 / scaling),
            *(logits_CV.stride(0), entries, gradients),
            *(min(ENTRIES, triton.next_power_of_2(entries)), STAGES),
            num_warps=WARPS,
        )
    return losses_C


@triton.jit
def cross_entropy_kernel(
    logits, targets, losses, ignored, factor,
    ROW: tl.constexpr, V: tl.constexpr, GRADIENTS: tl.constexpr,
    K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * ROW
    target = tl.load(targets + row)
    is_real = (target != ignored) & (target >= 0) & (target < V)
    most = -float("inf")
    sums_K = tl.zeros((K,), tl.float32)
    factor2 = factor * LOG2_E
    for begin in tl.range(0, V, K, num_stages=STAGES):
        v_K = begin + tl.arange(0, K)
        keep_K = (v_K < V) & is_real
        score_K = tl.load(logits + v_K, mask=keep_K, other=-float("inf")).to(tl.float32) * factor2
        higher = tl.maximum(most, tl.max(score_K, 0))
        # Without a finite score yet: nothing to shift by, and infinities must not meet.
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        sums_K = sums_K * tl.exp2(most - shift) + tl.exp2(score_K - shift)
        most = higher
    log_sum2 = most + tl.log2(tl.sum(sums_K, 0))
    chosen = tl.load(logits + target, mask=is_real, other=0.0).to(tl.float32) * factor
    loss = tl.where(is_real, log_sum2 * LN_2 - chosen, 0.0)
    tl.store(losses + row, tl.where(is_real | (target == ignored), loss, float("nan")))
    if GRADIENTS:
        tl.debug_barrier()  # the target's logit is read before it is overwritten
        log_sum2 = tl.where(is_real, log_sum2, 0.0)
        slope = tl.where(is_real, factor, 0.0)
        for begin in tl.range(0, V, K, num_stages=STAGES):
            v_K = begin + tl.arange(0, K)
            keep_K = v_K < V
            logit_K = tl.load(logits + v_K, mask=keep_K & is_real, other=0.0).to(tl.float32)
            gradient_K = tl.exp2(logit_K * factor2 - log_sum2) * slope
            tl.store(logits + v_K, gradient_K.to(logits.dtype.element_ty), mask=keep_K)
        tl.debug_barrier()  # before its gradient is, too
        gradient = tl.exp2(chosen * LOG2_E - log_sum2) * slope - slope
        tl.store(logits + target, gradient.to(logits.dtype.element_ty), mask=is_real)
