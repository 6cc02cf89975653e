"""Prefills, and with them whole generations, replayed as CUDA graphs.

A prompt takes a small model hundreds of launches, and their time is most of a short prompt's.

Shape suffixes: B batch, T tokens of a prompt, N new tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor

from workbench.compilation import compiled_blocks
from workbench.decoding import (
    Capture,
    CapturedStep,
    Places,
    next_from,
    refusal,
    require_cuda,
)
from workbench.generation import GREEDY, SamplingConfig
from workbench.layer import State
from workbench.model import HybridLM


class CapturedPrefill:
    """`model.prefill` of prompts of one shape, captured once and replayed by each call.

    Each call fills the states as if they were empty. A `CapturedStep` may be made on them after
    the first call, and goes on from the latest. To be made and used under `torch.inference_mode`.

    Args:
        states: empty, as `model.init_state` gives them.
        prompt_BT: a prompt of the shape.
        sampling, generator: as of `CapturedStep`.
        compiled: whether its blocks are compiled for the shape: seconds a kind of block.

    Raises:
        NotCapturedError: the model's prefills cannot be captured; says why.
    """

    def __init__(
        self,
        model: HybridLM,
        states: list[State],
        prompt_BT: Tensor,
        *,
        sampling: SamplingConfig | None = None,
        generator: torch.Generator | None = None,
        compiled: bool = True,
    ) -> None:
        require_cuda(model, "prefills")
        self._states, self._prompt_BT = states, prompt_BT.clone()
        empty = Empty(states)
        model.prefill(self._prompt_BT, states)
        if reason := empty.places.moved():
            raise refusal("prefills", reason.replace("a step of", "a prefill of"))
        empty.again()

        def run() -> Tensor:
            empty.again()
            logits_BV = model.prefill(self._prompt_BT, states)
            empty.places.take_back()
            return next_from(logits_BV, sampling, generator)

        with compiled_blocks(model, "forward") if compiled else contextlib.nullcontext():
            self._capture = Capture(model.device, run, empty.again, generator)
        # What the host counted while capturing; the tensors are those that a replay writes.
        self._filled = [sharing(state) for state in states]

    def __call__(self, prompt_BT: Tensor) -> Tensor:
        """The logits `[B, V]` after a prompt `[B, T]`, or the tokens drawn from them, `[B]`.

        The result is overwritten by the next call.
        """
        self._prompt_BT.copy_(prompt_BT)
        result = self._capture.replay()
        self.rewind()
        return result

    def rewind(self) -> None:
        """Let states count from the end of the prompt again; what steps overwrote stays so."""
        for state, filled in zip(self._states, self._filled, strict=True):
            state.restore(filled)


def captured_prefill(model: HybridLM, prompt_BT: Tensor) -> CapturedPrefill:
    """Prefills of a prompt's shape on states of their own: for measuring, so not compiled.

    Raises:
        NotCapturedError: the model's prefills cannot be captured; says why.
    """
    states = model.init_state(*prompt_BT.shape)
    return CapturedPrefill(model, states, prompt_BT, compiled=False)


class Empty:
    """What empty states hold, to make them empty again: in place, so that a graph can do it.

    Attributes:
        places: where their tensors lie.
    """

    def __init__(self, states: list[State]) -> None:
        self.places = Places(states)
        self._states, self._counters = states, [sharing(state) for state in states]
        self._tensors = [
            (tensor, tensor.clone() if bool(tensor.any()) else None)
            for _, _, tensor in self.places.held
        ]

    def again(self) -> None:
        """Empty the states."""
        self.places.take_back()
        for state, counters in zip(self._states, self._counters, strict=True):
            state.restore(counters)
        for tensor, value in self._tensors:
            tensor.zero_() if value is None else tensor.copy_(value)


def sharing(state: State) -> Any:
    """A copy of what a state counts on the host, with the very same tensors."""
    values = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    nested = {name: sharing(value) for name, value in values.items() if isinstance(value, State)}
    return dataclasses.replace(state, **nested)


class CapturedGeneration:
    """Whole generations of one shape, prefill and steps captured once and replayed by each call.

    To be made and used under `torch.inference_mode`.

    Args:
        prompt_BT: a prompt of the shape.

    Attributes:
        prefill, step: the captured parts, on the same states.

    Raises:
        NotCapturedError: the model cannot be captured; says why.
    """

    def __init__(
        self,
        model: HybridLM,
        prompt_BT: Tensor,
        max_new_tokens: int,
        *,
        sampling: SamplingConfig = GREEDY,
        seed: int = 0,
    ) -> None:
        require_cuda(model, "generations")
        batch, length = prompt_BT.shape
        drawn: dict[str, Any] = {
            "sampling": sampling,
            "generator": torch.Generator(model.device).manual_seed(seed),
        }
        states = model.init_state(batch, length + max_new_tokens)
        self.prefill = CapturedPrefill(model, states, prompt_BT, **drawn)
        self.prefill(prompt_BT)
        self.step = CapturedStep(model, states, batch, **drawn)
        self._new_BN = prompt_BT.new_empty((batch, max_new_tokens))

    def __call__(self, prompt_BT: Tensor) -> Tensor:
        """The tokens that continue a prompt `[B, T]`, `[B, max_new_tokens]`."""
        tokens_B = self.prefill(prompt_BT)
        for index in range(self._new_BN.shape[1]):
            tokens_B = self.step(tokens_B) if index else tokens_B
            self._new_BN[:, index] = tokens_B
        return self._new_BN.clone()
