"""Random access randomness, and windows over a token array.

Shape suffixes: B batch, T tokens, N tokens of a whole part, W windows.

Every draw comes from Philox, a counter-based generator: the key holds (seed, stream) and the
counter holds the step, so any step can be had without the earlier ones (Salmon et al., 2011,
"Parallel random numbers: as easy as 1, 2, 3"). Only its raw bits are used: numpy keeps those
stable across versions, and not those of the methods that `numpy.random.Generator` adds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.errors import FieldError
from workbench.model import IGNORE

TRAIN, VALIDATION = 0, 1  # streams


def generator(*, seed: int, stream: int, step: int) -> np.random.Philox:
    """Random bits that depend on nothing but (seed, stream, step)."""
    key = np.array([seed % 2**64, stream], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, step, 0], dtype=np.uint64))


def uniform(bits: np.random.Philox, *shape: int) -> NDArray[np.float64]:
    """The next uniform draws in (0, 1], on the grid of multiples of 2**-53."""
    raw: NDArray[np.uint64] = np.asarray(bits.random_raw(shape))
    return ((raw >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53


def random_starts(
    num_tokens: int, batch_size: int, length: int, *, seed: int, step: int
) -> NDArray[np.int64]:
    """Where the windows of one training batch begin, `[B]`; each holds `length + 1` tokens.

    Raises:
        FieldError: not even one window fits.
    """
    if num_tokens <= length:
        raise FieldError(
            "seq_len",
            f"{length} inputs and the target after them do not fit into a training part of "
            f"{num_tokens} tokens: "
            + (f"use at most {num_tokens - 1}, or add data" if num_tokens > 1 else "add data"),
        )
    raw = np.asarray(generator(seed=seed, stream=TRAIN, step=step).random_raw(batch_size))
    return (raw % np.uint64(num_tokens - length)).astype(np.int64)


def validation_starts(num_tokens: int, length: int, limit: int) -> NDArray[np.int64]:
    """Where the validation windows begin, `[W]`: neighbours, or spread evenly under a limit.

    They lie on one grid whatever the limit, so no target is judged twice. The grid's last
    window may be short.

    Args:
        limit: judge about so many tokens, rounded up to whole windows.
    """
    total = -(-(num_tokens - 1) // length)
    wanted = min(total, -(-limit // length))
    return np.arange(wanted, dtype=np.int64) * total // wanted * length


def gather(
    tokens_N: NDArray[Any], starts_B: NDArray[np.int64], length: int
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both int64 `[B, T]`, of the windows that begin at `starts_B`.

    Beyond the part's end, inputs are token 0 and targets are -100: padding on the right, which
    no causal model can see.
    """
    at_BT = starts_B[:, None] + np.arange(length + 1)
    inside_BT = at_BT < len(tokens_N)
    found_BT = tokens_N[np.where(inside_BT, at_BT, 0)].astype(np.int64)
    inputs_BT = np.where(inside_BT, found_BT, 0)[:, :-1]
    targets_BT = np.where(inside_BT, found_BT, IGNORE)[:, 1:]
    return (
        torch.from_numpy(np.ascontiguousarray(inputs_BT)),
        torch.from_numpy(np.ascontiguousarray(targets_BT)),
    )
