"""Peak memory of a phase of inference or of a training step: CUDA devices only.

What first calls allocate to tune kernels is not in it: each phase runs once before.

Shape suffixes: B batch, T tokens, S steps.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch

from workbench.compilation import preparing
from workbench.errors import FieldError
from workbench.layer import State
from workbench.measuring import (
    MemoryPeak,
    Stepper,
    check_sizes,
    eager,
    memory_peak,
    random_tokens,
    undisturbed,
)
from workbench.model import HybridLM
from workbench.optimizers import make_optimizers
from workbench.training_config import TrainingConfig


def inference_memory(
    model: HybridLM,
    phase: Literal["prefill", "decode"],
    batch_size: int,
    context: int,
    tokens: int = 2,
    *,
    seed: int = 0,
    stepper: Stepper = eager,
) -> MemoryPeak:
    """Peak memory of a prefill of `context` tokens, or of `tokens` decode steps after one.

    Weights and states count; for `"decode"` the prefill itself does not.

    Raises:
        FieldError: a size below 1.
        WorkbenchError: not a CUDA device.
    """
    check_sizes(batch_size=(batch_size, 1), context=(context, 1), tokens=(tokens, 1))
    if phase not in ("prefill", "decode"):
        raise FieldError("phase", f"must be 'prefill' or 'decode', got {phase!r}")
    memory_peak(lambda: None, model.device)  # refuses before any work
    with undisturbed(model):
        prompt_BT = random_tokens(model, (batch_size, context), seed)
        next_SB = random_tokens(model, (tokens, batch_size), seed + 1)
        states = model.init_state(batch_size, context + tokens)
        if phase == "prefill":
            with preparing(model.device):
                model.prefill(prompt_BT, copy.deepcopy(states))
            return memory_peak(lambda: model.prefill(prompt_BT, states), model.device)
        model.prefill(prompt_BT, states)

        def decode(states: list[State]) -> None:
            step = stepper(model, states, batch_size)
            for tokens_B in next_SB:
                step(tokens_B)

        with preparing(model.device):
            decode(copy.deepcopy(states))
        return memory_peak(lambda: decode(states), model.device)


def training_memory(model: HybridLM, config: TrainingConfig, *, seed: int = 0) -> MemoryPeak:
    """Peak memory of the second training step: weights, gradients, optimizer, activations.

    Changes the weights: give it a model that nobody needs, not quantized.

    Raises:
        WorkbenchError: not a CUDA device.
    """
    memory_peak(lambda: None, model.device)
    optimizers = make_optimizers(model.train(), config)
    shape = (config.batch_size, config.seq_len + 1)
    tokens_BT = random_tokens(model, shape, seed)

    def step() -> None:
        bfloat16 = config.precision == "bfloat16"
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            loss = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    with preparing(model.device):
        step()  # allocates the optimizers' states, too
    return memory_peak(step, model.device)
