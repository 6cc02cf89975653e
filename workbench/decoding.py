"""Decode steps replayed as CUDA graphs: one launch a token instead of hundreds.

Shape suffixes: B batch, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from workbench.compilation import compiled_blocks
from workbench.errors import WorkbenchError
from workbench.generation import SamplingConfig, sample
from workbench.layer import State
from workbench.linear_step import MAX_ROWS, few_rows, fusion
from workbench.model import HybridLM

WARMUP = 3  # calls before the capture: kernels are compiled and tuned in them
NO_CUDA = "CUDA graphs need a CUDA device"


class NotCapturedError(WorkbenchError):
    """A model's steps or prefills cannot be captured; says why."""


def why_not_captured(model: HybridLM, states: Sequence[State]) -> str:
    """Why the model's steps cannot be captured; empty if they can."""
    return why_not_static(model, states) if model.device.type == "cuda" else NO_CUDA


@torch.inference_mode()
def why_not_static(model: HybridLM, states: Sequence[State]) -> str:
    """Why a step cannot work on tensors alone, at fixed places; empty if it can, on any device.

    Takes a step on a copy of the states.
    """
    return _who_waits(model) or _make_static(model, copy.deepcopy(list(states)))


def _who_waits(model: HybridLM) -> str:
    for layer in model.layers:
        if layer.host_synchronized:
            return f"{type(layer).__name__} waits for the device within a step"
    return ""


def _make_static(model: HybridLM, states: list[State]) -> str:
    """Make states static and take a step on them; why that does not do, or nothing."""
    try:
        for state in states:
            state.make_static()
    except NotImplementedError as error:
        return str(error)
    places, others = Places(states), _others(states)
    sizes = [tensor.shape[0] for _, _, tensor in places.held if tensor.ndim]
    tokens_B = torch.zeros(sizes[0] if sizes else 1, dtype=torch.int64, device=model.device)
    model.step(tokens_B, states)
    for name, value in _others(states).items():
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


class Capture:
    """A function on fixed tensors as a CUDA graph, after a few calls beside the main stream.

    Args:
        run: what is captured. It is kept, and with it all that a replay reads.
        reset: goes before each call in the warm-up, and after it.
        generator: of what it draws, None for the device's own. The warm-up's draws are undone.
    """

    def __init__(
        self,
        device: torch.device,
        run: Callable[[], Tensor],
        reset: Callable[[], None],
        generator: torch.Generator | None,
    ) -> None:
        self._device, self._run = device, run
        self._graph = torch.cuda.CUDAGraph()
        if generator is not None:
            self._graph.register_generator_state(generator)
        with torch.cuda.device(device):
            default = torch.cuda.default_generators[torch.cuda.current_device()]
            with _undrawn(generator or default), _beside(device):
                for _ in range(WARMUP):
                    reset()
                    run()
                reset()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._result = run()

    def replay(self) -> Tensor:
        """What `run` gives, overwritten by the next call."""
        with torch.cuda.device(self._device):
            self._graph.replay()
        return self._result


@contextmanager
def _undrawn(generator: torch.Generator) -> Iterator[None]:
    state = generator.get_state()
    yield
    generator.set_state(state)


@contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """Run on another stream, as warming up for a capture demands."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def next_from(
    logits_BV: Tensor, sampling: SamplingConfig | None, generator: torch.Generator | None
) -> Tensor:
    """The tokens drawn from logits, or these themselves."""
    if sampling is None:
        return logits_BV
    if generator is None:
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
    return sample(logits_BV, sampling, generator)


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
        NotCapturedError: the model's steps cannot be captured; says why, and leaves the states as
            they were.
        WorkbenchError: the states are full.
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
        require_cuda(model, "decode steps")
        require_room(states)
        before = copy.deepcopy(states)
        if reason := _make_static(model, states):
            for state, earlier in zip(states, before, strict=True):
                vars(state).update(vars(earlier))
            raise refusal("decode steps", reason)
        self._states = states
        self.restore(before)
        tokens_B = torch.zeros(batch_size, dtype=torch.int64, device=model.device)
        places = Places(states)

        def run() -> Tensor:
            logits_BV = model.step(tokens_B, states)
            places.take_back()
            return next_from(logits_BV, sampling, generator)

        self._tokens_B = tokens_B
        with _fast_steps(model, batch_size):
            self._capture = Capture(model.device, run, lambda: self.restore(before), generator)

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
        result = self._capture.replay()
        for state in self._states:
            state.advance()
        return result


@contextmanager
def _fast_steps(model: HybridLM, batch_size: int) -> Iterator[None]:
    """Compile a model's steps, and its linears for few rows where they are few."""
    options: dict[str, Any] = {}
    if batch_size <= MAX_ROWS:
        options["post_grad_custom_post_pass"] = fusion()
    with few_rows(model, batch_size), compiled_blocks(model, "step", **options):
        yield


def set_state_dtype(model: HybridLM, dtype: torch.dtype | None) -> int:
    """Keep recurrences' states in a dtype from the next `init_state` on, wherever layers allow it.

    Layers that have a `state_dtype` (Mamba-2) allow it; None takes them back to their default,
    float32 at least. Returns how many there are.
    """
    layers = [module for module in model.modules() if hasattr(module, "state_dtype")]
    for layer in layers:
        layer.state_dtype = dtype  # type: ignore[assignment]
    return len(layers)


def require_cuda(model: HybridLM, what: str) -> None:
    """Refuse to capture `what` of a model that is elsewhere, or that waits for its device."""
    if reason := (NO_CUDA if model.device.type != "cuda" else _who_waits(model)):
        raise refusal(what, reason)


def refusal(what: str, reason: str) -> NotCapturedError:
    """The error that says why `what` is not captured."""
    return NotCapturedError(f"{what} cannot be captured as a CUDA graph: {reason}")


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
    try:
        return CapturedStep(model, states, batch_size)
    except NotCapturedError:
        return lambda tokens_B: model.step(tokens_B, states)
