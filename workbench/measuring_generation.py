"""Time of whole generations: to the first token, per token, and over all, prefill included.

Shape suffixes: B batch, T tokens of the prompt.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from workbench.clocks import clock_of
from workbench.compilation import preparing
from workbench.generation import GREEDY, SamplingConfig, sample
from workbench.measuring import (
    Stepper,
    Timing,
    check_sizes,
    eager,
    no_garbage_collection,
    random_tokens,
    undisturbed,
)
from workbench.model import HybridLM


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """How long real generations took.

    Attributes:
        first_token: prefill and drawing the first token (TTFT).
        per_token: each later token, from the one before it (TPOT).
        total: a whole generation.
        tokens_per_second: of all sequences together, over whole generations: prefill included.
    """

    first_token: Timing
    per_token: Timing
    total: Timing
    tokens_per_second: float


def generation_time(
    model: HybridLM,
    batch_size: int,
    context: int,
    tokens: int = 32,
    *,
    sampling: SamplingConfig = GREEDY,
    seed: int = 0,
    warmup: int = 1,
    repeats: int = 5,
    min_seconds: float = 0.2,
    stepper: Stepper = eager,
) -> Generation:
    """Time generations of `tokens` tokens after prompts of `context`: each token feeds the next.

    What a stepper does once for its states (capturing a graph) is not timed.

    Raises:
        FieldError: a size below 1, or fewer than 2 tokens or repeats.
    """
    check_sizes(batch_size=(batch_size, 1), context=(context, 1), tokens=(tokens, 2))
    check_sizes(warmup=(warmup, 0), repeats=(repeats, 2), min_seconds=(min_seconds, 0))
    with undisturbed(model), no_garbage_collection():
        prompt_BT = random_tokens(model, (batch_size, context), seed)
        generator = torch.Generator(model.device).manual_seed(seed)

        def generate() -> list[float]:
            return _generate(model, prompt_BT, tokens, sampling, generator, stepper)

        with preparing(model.device):
            for _ in range(warmup):
                generate()
        runs: list[list[float]] = []
        while len(runs) < repeats or sum(map(sum, runs)) < min_seconds:
            runs.append(generate())
    total = Timing.of([sum(run) for run in runs])
    return Generation(
        first_token=Timing.of([run[0] for run in runs]),
        per_token=Timing.of([seconds for run in runs for seconds in run[1:]]),
        total=total,
        tokens_per_second=batch_size * tokens / total.median,
    )


def _generate(
    model: HybridLM,
    prompt_BT: Tensor,
    tokens: int,
    sampling: SamplingConfig,
    generator: torch.Generator,
    stepper: Stepper,
) -> list[float]:
    """Seconds of each token of one generation, the first with the prefill."""
    clock = clock_of(model.device)
    states = model.init_state(prompt_BT.shape[0], prompt_BT.shape[1] + tokens)
    clock.mark()
    tokens_B = sample(model.prefill(prompt_BT, states), sampling, generator)
    clock.mark()
    first = clock.read()
    with preparing(model.device):
        step = stepper(model, states, prompt_BT.shape[0])
    clock.mark()
    for _ in range(tokens - 1):
        tokens_B = sample(step(tokens_B), sampling, generator)
        clock.mark()
    return first + clock.read()
