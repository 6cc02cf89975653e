"""Decode steps replayed as CUDA graphs: one launch a token instead of hundreds.

Shape suffixes: B batch, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workbench.compilation import compiled_blocks
from workbench.errors import WorkbenchError
from workbench.generation import SamplingConfig, sample
from workbench.layer import State
from workbench.model import HybridLM

WARMUP = 3  # steps before the capture: kernels are compiled and tuned in them


def why_not_captured(model: HybridLM, states: Sequence[State]) -> str:
    """Why the model's steps cannot be captured; empty if they can."""
    if model.device.type != "cuda":
        return "CUDA graphs need a CUDA device"
    return why_not_static(model, states)


@torch.inference_mode()
def why_not_static(model: HybridLM, states: Sequence[State]) -> str:
    """Why a step cannot work on tensors alone, at fixed places; empty if it can, on any device.

    Takes a step on a copy of the states.
    """
    for layer in model.layers:
        if layer.host_synchronized:
            return f"{type(layer).__name__} waits for the device within a step"
    copies = copy.deepcopy(list(states))
    try:
        for state in copies:
            state.make_static()
    except NotImplementedError as error:
        return str(error)
    places, others = Places(copies), _others(copies)
    sizes = [tensor.shape[0] for _, _, tensor in places.held if tensor.ndim]
    tokens_B = torch.zeros(sizes[0] if sizes else 1, dtype=torch.int64, device=model.device)
    model.step(tokens_B, copies)
    for name, value in _others(copies).items():
        if value != others.get(name):
            return f"a step changes {name}, which is no tensor"
    return places.moved()


def _others(states: Sequence[State], prefix: str = "") -> dict[str, str]:
    """What states hold besides tensors, as text: field → value."""
    found: dict[str, str] = {}
    for index, state in enumerate(states):
        for field in dataclasses.fields(state):
            value, name = getattr(state, field.name), f"{type(state).__name__}.{field.name}"
            if isinstance(value, State):
                found |= _others([value], f"{prefix}{index}.")
            elif not isinstance(value, Tensor):
                found[f"{prefix}{index}.{name}"] = repr(value)
    return found


class Places:
    """Where the tensors of states lie: a graph reads and writes them there, and nowhere else.

    Attributes:
        held: state, field and tensor of each.
    """

    def __init__(self, states: Sequence[State]) -> None:
        self.held: list[tuple[State, str, Tensor]] = []
        for state in states:
            self._add(state)

    def _add(self, state: State) -> None:
        for field in dataclasses.fields(state):
            value = getattr(state, field.name)
            if isinstance(value, State):
                self._add(value)
            elif isinstance(value, Tensor):
                self.held.append((state, field.name, value))

    def moved(self) -> str:
        """Why `take_back` would not do; empty if it would."""
        for state, name, before in self.held:
            now = getattr(state, name)
            if not isinstance(now, Tensor) or (now.shape, now.dtype) != (
                before.shape,
                before.dtype,
            ):
                return f"a step of {type(state).__name__} changes the size or kind of {name!r}"
        return ""

    def take_back(self) -> None:
        """Copy a tensor that a layer put in another's stead to where that one lay."""
        moved = [held for held in self.held if getattr(held[0], held[1]) is not held[2]]
        # Read before any is written: a step may pass a tensor from one field on to another.
        values = [getattr(state, name).clone() for state, name, _ in moved]
        for (state, name, before), value in zip(moved, values, strict=True):
            before.copy_(value)
            setattr(state, name, before)


class CapturedStep:
    """`model.step` on fixed states, captured once and replayed by each call.

    The states become static (`State.make_static`) and are updated in place, as by `model.step`;
    `restore` takes them back. To be made and used under `torch.inference_mode`.

    Args:
        states: filled by a prefill.
        sampling: if given, a call's result is the next tokens and not the logits: they are drawn
            on the device.
        generator: of the draws, on the model's device.

    Raises:
        WorkbenchError: the model's steps cannot be captured; says why.
    """

    def __init__(
        self,
        model: HybridLM,
        states: list[State],
        batch_size: int,
        *,
        sampling: SamplingConfig | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if reason := why_not_captured(model, states):
            raise WorkbenchError(f"decode steps cannot be captured as a CUDA graph: {reason}")
        require_room(states)
        self._model, self._states = model, states
        self._sampling, self._generator = sampling, generator
        self._tokens_B = torch.zeros(batch_size, dtype=torch.int64, device=model.device)
        before = copy.deepcopy(states)
        for state in states:
            state.make_static()
        self._places = Places(states)
        self._graph = torch.cuda.CUDAGraph()
        if generator is not None:
            self._graph.register_generator_state(generator)
        with torch.cuda.device(model.device), compiled_blocks(model, "step"):
            self._warm_up(before)
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._result = self._run()

    def _run(self) -> Tensor:
        logits_BV = self._model.step(self._tokens_B, self._states)
        self._places.take_back()
        if self._sampling is None:
            return logits_BV
        generator = self._generator or torch.cuda.default_generators[self._model.device.index or 0]
        return sample(logits_BV, self._sampling, generator)

    def _warm_up(self, before: list[State]) -> None:
        """Run a few steps, beside the main stream as a capture demands, and undo them."""
        drawn = None if self._generator is None else self._generator.get_state()
        stream = torch.cuda.Stream(self._model.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._model.device))
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                self.restore(before)
                self._run()
            self.restore(before)
        torch.cuda.current_stream(self._model.device).wait_stream(stream)
        if self._generator is not None and drawn is not None:
            self._generator.set_state(drawn)

    def restore(self, before: Sequence[State]) -> None:
        """Go on from states that are as those given at first were, or copies of them."""
        for state, earlier in zip(self._states, before, strict=True):
            state.restore(earlier)

    def __call__(self, tokens_B: Tensor) -> Tensor:
        """The logits `[B, V]` after the tokens `[B]`, or the tokens drawn from them, `[B]`.

        The result is overwritten by the next call.

        Raises:
            WorkbenchError: the states have no room for another token.
        """
        require_room(self._states)
        self._tokens_B.copy_(tokens_B)
        with torch.cuda.device(self._model.device):
            self._graph.replay()
        for state in self._states:
            state.advance()
        return self._result


def require_room(states: Sequence[State]) -> None:
    """Refuse a step that the states cannot take: a graph would write past their end.

    Raises:
        WorkbenchError: a state is full.
    """
    for state in states:
        if state.room == 0:
            raise WorkbenchError(
                f"{type(state).__name__} is full: make the states with a larger max_length"
            )


def captured_or_eager(
    model: HybridLM, states: list[State], batch_size: int
) -> Callable[[Tensor], Tensor]:
    """A step on `states`: captured where that works, else `model.step`."""
    if why_not_captured(model, states):
        return lambda tokens_B: model.step(tokens_B, states)
    return CapturedStep(model, states, batch_size)
