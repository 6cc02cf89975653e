"""Honest timing and peak memory of functions and models on a device.

What makes a figure honest here: warm-up calls are never in it, it is the median of many repeats
with its spread beside it, garbage is not collected meanwhile, and on a GPU the device's own clock
counts (CUDA events: the work, and the wait for launches wherever these are slower). Nothing else
should run on the device; a spread above `NOISY` marks a figure that something disturbed.

Measuring leaves a model as it was: weights, training flags and random generators are untouched.

How single steps and prefills run can be replaced (`Stepper`, `Prefiller`), by a CUDA graph say; the
default is `model.step` and `model.prefill`.

Shape suffixes: B batch, T tokens of the prompt, S timed steps, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from workbench.clocks import Clock, clock_of
from workbench.compilation import preparing
from workbench.errors import FieldError, UnknownNameError, WorkbenchError
from workbench.generation import GREEDY, SamplingConfig, sample
from workbench.layer import State
from workbench.model import HybridLM

NOISY = 0.05  # relative spread above which a timing is marked

# Makes the function that takes one decode step, logits [B, V] after tokens [B], from the model, the
# filled states that the steps carry on, and the batch size. What a step carries is in those states:
# between two steps they may be taken back to an earlier moment, by `State.restore`.
Step = Callable[[Tensor], Tensor]
Stepper = Callable[[HybridLM, list[State], int], Step]

# Makes the function that takes prompts of one shape in, logits [B, V] after prompts [B, T], each
# time as if it were the first, from the model and such a prompt.
Prefill = Callable[[Tensor], Tensor]
Prefiller = Callable[[HybridLM, Tensor], Prefill]

EAGER, CAPTURED = "eager", "cuda-graph"
STEPS = ("auto", EAGER, CAPTURED)


def eager(model: HybridLM, states: list[State], batch_size: int) -> Step:
    """The default Stepper: `model.step`, launch by launch."""
    return lambda tokens_B: model.step(tokens_B, states)


def stepper_of(steps: str, device: str) -> tuple[str, Stepper]:
    """A way to run steps by its name, one of `STEPS`, with that name.

    `"auto"` captures them on a CUDA device.

    Raises:
        UnknownNameError: no such way. A model that cannot be captured raises when it is stepped.
    """
    if steps not in STEPS:
        raise UnknownNameError("way to run steps", steps, STEPS)
    if steps == EAGER or (steps == "auto" and torch.device(device).type != "cuda"):
        return EAGER, eager
    from workbench.decoding import CapturedStep

    return CAPTURED, CapturedStep


def prefiller_of(steps: str, device: str) -> Prefiller | None:
    """How prefills run where steps run as `stepper_of` says; None for `model.prefill`.

    Raises:
        UnknownNameError: no such way. A model that cannot be captured raises when it is prefilled.
    """
    if stepper_of(steps, device)[0] == EAGER:
        return None
    from workbench.captured_generation import captured_prefill

    return captured_prefill


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds a call.

    Attributes:
        median: the figure.
        p10, p90: the 10th and 90th percentile.
        repeats: how many calls were timed.
    """

    median: float
    p10: float
    p90: float
    repeats: int

    @property
    def spread(self) -> float:
        """Distance of the 10th to the 90th percentile, relative to the median."""
        return (self.p90 - self.p10) / self.median

    @property
    def noisy(self) -> bool:
        """Whether the spread is above 5 %: time again on a quieter machine before concluding."""
        return self.spread > NOISY

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """What at least two timed calls come to."""
        deciles = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(
            median=statistics.median(seconds), p10=deciles[0], p90=deciles[-1], repeats=len(seconds)
        )


def time_calls(
    function: Callable[..., object],
    *,
    device: torch.device | str,
    warmup: int = 3,
    repeats: int = 20,
    min_seconds: float = 0.2,
    arguments: Iterable[tuple[Any, ...]] | None = None,
    clock: Callable[[torch.device], Clock] | None = None,
) -> Timing:
    """Time calls of `function`, at least `repeats` of them and for at least `min_seconds`.

    Args:
        device: where its work happens; decides the clock.
        warmup: calls before the first timed one.
        repeats: at least 2.
        min_seconds: sum of the timed calls.
        arguments: endless; one tuple of arguments a call, made outside the timed part. None
            calls without any.
        clock: what tells the time; None is the wall's for a CPU, the device's own for a GPU.

    Raises:
        FieldError: fewer than 2 repeats, or a negative warm-up or duration.
        WorkbenchError: a device whose clock is not known here.
    """
    check_sizes(repeats=(repeats, 2), warmup=(warmup, 0), min_seconds=(min_seconds, 0))
    device = torch.device(device)
    ticking = (clock or clock_of)(device)
    supply = itertools.repeat(()) if arguments is None else iter(arguments)
    with preparing(device):
        for values in itertools.islice(supply, warmup):
            function(*values)
    seconds: list[float] = []
    with no_garbage_collection():
        while len(seconds) < repeats or sum(seconds) < min_seconds:
            for values in itertools.islice(supply, repeats):
                ticking.mark()
                function(*values)
                ticking.mark()
            seconds += ticking.read()[::2]
    return Timing.of(seconds)


def decode_time(
    model: HybridLM,
    batch_size: int,
    context: int,
    tokens: int = 32,
    *,
    seed: int = 0,
    warmup: int = 5,
    min_seconds: float = 0.2,
    stepper: Stepper = eager,
    cold: bool = False,
    clock: Callable[[torch.device], Clock] | None = None,
) -> Timing:
    """Seconds a decode step: one more token for each of `batch_size` sequences.

    The states are filled by a prefill of `context` random tokens; then single steps are timed,
    sampling not included. After `tokens` steps the filled states are restored, so that the
    context stays between `context` and `context + tokens` however long the measuring takes (the
    states are held twice for that). `stepper` and `clock` say how steps run and are timed.

    With `cold` each step of a CUDA device begins with nothing of the model in its last cache, as a
    layer does in a model larger than that; elsewhere it changes nothing.

    Raises:
        FieldError: a size below 1.
    """
    check_sizes(batch_size=(batch_size, 1), context=(context, 1), tokens=(tokens, 1))
    with undisturbed(model):
        filled = model.init_state(batch_size, context + tokens)
        model.prefill(random_tokens(model, (batch_size, context), seed), filled)
        next_SB = random_tokens(model, (tokens, batch_size), seed + 1)
        states = copy.deepcopy(filled)
        with preparing(model.device):
            step = stepper(model, states, batch_size)
        return time_calls(
            step,
            device=model.device,
            warmup=warmup,
            min_seconds=min_seconds,
            arguments=_after(_flush(model.device, cold), _steps(next_SB, states, filled)),
            clock=clock,
        )


def _steps(next_SB: Tensor, states: list[State], filled: list[State]) -> Iterator[tuple[Tensor]]:
    """Arguments of a step, for ever; after the last of them all starts again from `filled`."""
    while True:
        for state, before in zip(states, filled, strict=True):
            state.restore(before)
        for tokens_B in next_SB:
            yield (tokens_B,)


def _after(flush: Callable[[], object], arguments: Iterable[Any]) -> Iterator[Any]:
    """The arguments of calls, each given after a flush, which is outside of the timed part."""
    for values in arguments:
        flush()
        yield values


def _flush(device: torch.device, cold: bool) -> Callable[[], object]:
    """What drives everything out of a CUDA device's last cache: twice as many bytes, written."""
    if not cold or device.type != "cuda":
        return lambda: None
    held = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(2 * held, dtype=torch.uint8, device=device).zero_


def prefill_time(
    model: HybridLM,
    batch_size: int,
    length: int,
    *,
    seed: int = 0,
    warmup: int = 2,
    repeats: int = 5,
    min_seconds: float = 0.2,
    prefiller: Prefiller | None = None,
    cold: bool = False,
    clock: Callable[[torch.device], Clock] | None = None,
) -> Timing:
    """Seconds to take in prompts of `length` random tokens and score the token after them.

    Each call fills fresh states, allocated outside the timed part; what a `prefiller` makes
    empties its own in each call, and what it does before the first (capturing) is not timed. `cold`
    is as in `decode_time`.

    Raises:
        FieldError: a size below 1.
    """
    check_sizes(batch_size=(batch_size, 1), length=(length, 1))
    with undisturbed(model):
        prompt_BT = random_tokens(model, (batch_size, length), seed)
        timed: dict[str, Any] = {
            "device": model.device,
            "warmup": warmup,
            "repeats": repeats,
            "min_seconds": min_seconds,
            "clock": clock,
        }
        flush = _flush(model.device, cold)
        if prefiller is None:
            fresh = ((prompt_BT, model.init_state(batch_size, length)) for _ in itertools.count())
            return time_calls(model.prefill, arguments=_after(flush, fresh), **timed)
        with preparing(model.device):
            prefill = prefiller(model, prompt_BT)
        again = _after(flush, itertools.repeat((prompt_BT,)))
        return time_calls(prefill, arguments=again, **timed)


def first_token_time(
    model: HybridLM,
    batch_size: int,
    length: int,
    *,
    sampling: SamplingConfig = GREEDY,
    seed: int = 0,
    warmup: int = 2,
    repeats: int = 5,
    min_seconds: float = 0.2,
) -> Timing:
    """Seconds to the first token (TTFT): prompts of `length` random tokens in, a token drawn.

    As `prefill_time`, and sampling; the token stays on the device.

    Raises:
        FieldError: a size below 1.
    """
    check_sizes(batch_size=(batch_size, 1), length=(length, 1))
    with undisturbed(model):
        prompt_BT = random_tokens(model, (batch_size, length), seed)
        generator = torch.Generator(model.device).manual_seed(seed)
        return time_calls(
            lambda states: sample(model.prefill(prompt_BT, states), sampling, generator),
            device=model.device,
            warmup=warmup,
            repeats=repeats,
            min_seconds=min_seconds,
            arguments=((model.init_state(batch_size, length),) for _ in itertools.count()),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPeak:
    """Bytes of a device's memory at the worst moment.

    Attributes:
        allocated: held by tensors, those that were there before included.
        reserved: taken from the device by torch's allocator: what other programs cannot have.
    """

    allocated: int
    reserved: int


def memory_peak(function: Callable[[], object], device: torch.device | str) -> MemoryPeak:
    """Peak memory of one call; what the allocator held idle before is given back first.

    Raises:
        WorkbenchError: not a CUDA device. A CPU has no such counter: a process's resident set
            holds what the allocator has not given back and everything else the process did.
    """
    device = torch.device(device)
    if device.type != "cuda":
        raise WorkbenchError(
            f"peak memory cannot be measured on {device.type!r}: there is no counter of live "
            "tensors. Measure on 'cuda', or take the exact weights and state bytes instead."
        )
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return MemoryPeak(
        allocated=torch.cuda.max_memory_allocated(device),
        reserved=torch.cuda.max_memory_reserved(device),
    )


def peak_memory(function: Callable[[], object], device: torch.device | str) -> int:
    """`memory_peak(...).allocated`: bytes that tensors held at the worst moment of one call."""
    return memory_peak(function, device).allocated


def check_sizes(**limits: tuple[float, float]) -> None:
    for name, (value, least) in limits.items():
        if value < least:
            raise FieldError(name, f"must be at least {least}, got {value}")


def random_tokens(model: HybridLM, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.layout.vocab_size, shape, generator=generator)
    return tokens.to(model.device)


@contextmanager
def undisturbed(model: HybridLM) -> Iterator[None]:
    """Inference on `model`; every module's training flag is as before afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
