"""Text from a model: prefill once, then step by step over the layers' states.

Shape suffixes: B batch, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Annotated

import torch
from torch import Tensor

from workbench.config import Range
from workbench.errors import FieldError
from workbench.layer import PLAIN, Context, State
from workbench.model import HybridLM


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is drawn."""

    temperature: Annotated[float, Range(0.0, 10.0), "0 takes the most likely token"] = 0.8
    top_k: Annotated[int | None, "only the k most likely tokens"] = None
    top_p: Annotated[float, Range(0.0, 1.0), "the smallest set with this probability"] = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise FieldError("temperature", f"must not be negative, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise FieldError("top_k", f"must be at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise FieldError("top_p", f"must be above 0 and at most 1, got {self.top_p}")


GREEDY = SamplingConfig(temperature=0.0)
REPLACEMENT = "\ufffd"  # what decoders show for bytes that are no whole character


def sample(logits_BV: Tensor, config: SamplingConfig, generator: torch.Generator) -> Tensor:
    """One token id a row, `[B]`, drawn from `logits_BV`."""
    if config.temperature == 0:
        return logits_BV.argmax(-1)
    scores_BV = logits_BV.float() / config.temperature
    if config.top_k is not None and config.top_k < scores_BV.shape[-1]:
        least_B1 = scores_BV.topk(config.top_k).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < least_B1, -torch.inf)
    if config.top_p < 1:
        ordered_BV, order_BV = scores_BV.sort(descending=True)
        probability_BV = ordered_BV.softmax(-1)
        beyond_BV = probability_BV.cumsum(-1) - probability_BV >= config.top_p
        drop_BV = beyond_BV.scatter(-1, order_BV, beyond_BV)
        scores_BV = scores_BV.masked_fill(drop_BV, -torch.inf)
    return torch.multinomial(scores_BV.softmax(-1), 1, generator=generator)[:, 0]


@torch.inference_mode()
def stream(
    model: HybridLM,
    prompt_BT: Tensor,
    max_new_tokens: int,
    *,
    config: SamplingConfig = GREEDY,
    seed: int = 0,
    context: Context = PLAIN,
    capture: bool = False,
) -> Iterator[Tensor]:
    """Yield the next token of every sequence, `[B]`, `max_new_tokens` times.

    Args:
        prompt_BT: int64 ids on the model's device, at least one token a row; shorter prompts are
            padded on the left and masked in `context`.
        seed: of the draws; greedy decoding needs none.
        capture: replay steps as a CUDA graph (`decoding.CapturedStep`): worth its capture, which
            may compile for seconds, from some hundred tokens on.

    Raises:
        WorkbenchError: the steps cannot be captured.
        FieldError: with the first token; an empty prompt, or ids that the vocabulary does not have.
    """
    if prompt_BT.ndim != 2:
        raise FieldError("prompt", f"must be [batch, tokens], got shape {list(prompt_BT.shape)}")
    if prompt_BT.numel() == 0:
        raise FieldError("prompt", "is empty: give at least one token")
    if int(prompt_BT.max()) >= model.layout.vocab_size or int(prompt_BT.min()) < 0:
        raise FieldError("prompt", f"token ids must be below {model.layout.vocab_size}")
    generator = torch.Generator(model.device).manual_seed(seed)
    states = model.init_state(prompt_BT.shape[0], prompt_BT.shape[1] + max_new_tokens)
    tokens_B = sample(model.prefill(prompt_BT, states, context), config, generator)
    next_tokens = _next_tokens(model, states, len(prompt_BT), config, generator, capture)
    for index in range(max_new_tokens):
        yield tokens_B
        if index + 1 < max_new_tokens:
            tokens_B = next_tokens(tokens_B)


def _next_tokens(
    model: HybridLM,
    states: list[State],
    batch_size: int,
    config: SamplingConfig,
    generator: torch.Generator,
    capture: bool,
) -> Callable[[Tensor], Tensor]:
    """From the last tokens to the next ones, `[B]` to `[B]`."""
    if capture:
        from workbench.decoding import CapturedStep

        step = CapturedStep(model, states, batch_size, sampling=config, generator=generator)
        return lambda tokens_B: step(tokens_B).clone()
    return lambda tokens_B: sample(model.step(tokens_B, states), config, generator)


def generate(model: HybridLM, prompt_BT: Tensor, max_new_tokens: int, **options: object) -> Tensor:
    """Prompt and continuation, `[B, T + max_new_tokens]`; options as for `stream`."""
    new = list(stream(model, prompt_BT, max_new_tokens, **options))  # type: ignore[arg-type]
    return torch.cat([prompt_BT, *(tokens_B[:, None] for tokens_B in new)], dim=1)


class TextStream:
    """The text of tokens as they come: whole characters only, each once.

    A character may take several tokens, and a token's text may depend on the one before it, so
    each piece is what decoding the last few tokens together adds to decoding the earlier of them.

    Args:
        decode: token ids → text, U+FFFD for bytes that are no whole character.
        prompt: ids whose text is out already.

    Attributes:
        tokens: those that were pushed.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: list[int]) -> None:
        self._decode = decode
        self._ids = list(prompt)
        self._context = 0  # where decoding starts, so that the pending tokens read as they should
        self._done = len(prompt)
        self.tokens: list[int] = []

    def push(self, token: int) -> str:
        """The text that a token completes; empty in the middle of a character."""
        self._ids.append(token)
        self.tokens.append(token)
        added = self._added()
        if not added or added.endswith(REPLACEMENT):
            return ""
        self._context, self._done = self._done, len(self._ids)
        return added

    def finish(self) -> str:
        """The text still pending, without the character that the last token left unfinished."""
        added = self._added().rstrip(REPLACEMENT)
        self._done = len(self._ids)
        return added

    def _added(self) -> str:
        known = self._decode(self._ids[self._context : self._done])
        return self._decode(self._ids[self._context :])[len(known) :]
