"""Honest timing and peak memory of functions and models on a device.

What makes a figure honest here: warm-up calls are never in it, it is the median of many repeats
with its spread beside it, garbage is not collected meanwhile, and on a GPU the device's own clock
counts (CUDA events: the work, and the wait for launches wherever these are slower). Nothing else
should run on the device; a spread above `NOISY` marks a figure that something disturbed.

Measuring leaves a model as it was: weights, training flags and random generators are untouched.

Shape suffixes: B batch, T tokens of the prompt, S timed steps.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from workbench.errors import FieldError, WorkbenchError
from workbench.layer import State
from workbench.model import HybridLM

NOISY = 0.05  # relative spread above which a timing is marked


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


def time_calls(
    function: Callable[..., object],
    *,
    device: torch.device | str,
    warmup: int = 3,
    repeats: int = 20,
    min_seconds: float = 0.2,
    arguments: Iterable[tuple[Any, ...]] | None = None,
) -> Timing:
    """Time calls of `function`, at least `repeats` of them and for at least `min_seconds`.

    Args:
        device: where its work happens; decides the clock.
        warmup: calls before the first timed one.
        repeats: at least 2.
        min_seconds: sum of the timed calls.
        arguments: endless; one tuple of arguments a call, made outside the timed part. None
            calls without any.

    Raises:
        FieldError: fewer than 2 repeats, or a negative warm-up or duration.
        WorkbenchError: a device whose clock is not known here.
    """
    _check(repeats=(repeats, 2), warmup=(warmup, 0), min_seconds=(min_seconds, 0))
    device = torch.device(device)
    clocks = {"cpu": _time_on_cpu, "cuda": _time_on_cuda}
    if device.type not in clocks:
        raise WorkbenchError(f"cannot time on {device.type!r}: use {' or '.join(clocks)}")
    supply = itertools.repeat(()) if arguments is None else iter(arguments)
    for values in itertools.islice(supply, warmup):
        function(*values)
    seconds: list[float] = []
    with _no_garbage_collection():
        while len(seconds) < repeats or sum(seconds) < min_seconds:
            seconds += clocks[device.type](function, itertools.islice(supply, repeats), device)
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return Timing(
        median=statistics.median(seconds), p10=deciles[0], p90=deciles[-1], repeats=len(seconds)
    )


def _time_on_cpu(
    function: Callable[..., object], arguments: Iterator[tuple[Any, ...]], device: torch.device
) -> list[float]:
    seconds = []
    for values in arguments:
        start = time.perf_counter()
        function(*values)
        seconds.append(time.perf_counter() - start)
    return seconds


def _time_on_cuda(
    function: Callable[..., object], arguments: Iterator[tuple[Any, ...]], device: torch.device
) -> list[float]:
    events = []
    with torch.cuda.device(device):
        for values in arguments:
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            function(*values)
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in events]


def decode_time(
    model: HybridLM,
    batch_size: int,
    context: int,
    tokens: int = 32,
    *,
    seed: int = 0,
    warmup: int = 5,
    min_seconds: float = 0.2,
) -> Timing:
    """Seconds a decode step: one more token for each of `batch_size` sequences.

    The states are filled by a prefill of `context` random tokens; then single steps are timed,
    sampling not included. After `tokens` steps the filled states are restored, so that the
    context stays between `context` and `context + tokens` however long the measuring takes (the
    states are held twice for that).

    Raises:
        FieldError: a size below 1.
    """
    _check(batch_size=(batch_size, 1), context=(context, 1), tokens=(tokens, 1))
    with _undisturbed(model):
        filled = model.init_state(batch_size, context + tokens)
        model.prefill(_random_tokens(model, (batch_size, context), seed), filled)
        next_SB = _random_tokens(model, (tokens, batch_size), seed + 1)
        return time_calls(
            model.step,
            device=model.device,
            warmup=warmup,
            min_seconds=min_seconds,
            arguments=_steps(next_SB, filled),
        )


def _steps(next_SB: Tensor, filled: list[State]) -> Iterator[tuple[Tensor, list[State]]]:
    """Arguments of `model.step`, for ever: all steps from a copy of `filled`, then from another."""
    while True:
        states = copy.deepcopy(filled)
        for tokens_B in next_SB:
            yield tokens_B, states


def prefill_time(
    model: HybridLM,
    batch_size: int,
    length: int,
    *,
    seed: int = 0,
    warmup: int = 2,
    repeats: int = 5,
    min_seconds: float = 0.2,
) -> Timing:
    """Seconds to take in prompts of `length` random tokens and score the token after them.

    Each call fills fresh states, allocated outside the timed part.

    Raises:
        FieldError: a size below 1.
    """
    _check(batch_size=(batch_size, 1), length=(length, 1))
    with _undisturbed(model):
        prompt_BT = _random_tokens(model, (batch_size, length), seed)
        return time_calls(
            model.prefill,
            device=model.device,
            warmup=warmup,
            repeats=repeats,
            min_seconds=min_seconds,
            arguments=(
                (prompt_BT, model.init_state(batch_size, length)) for _ in itertools.count()
            ),
        )


def peak_memory(function: Callable[[], object], device: torch.device | str) -> int:
    """Bytes of the device's memory that tensors held at the worst moment of one call.

    What was allocated before the call counts too.

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
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def _check(**limits: tuple[float, float]) -> None:
    for name, (value, least) in limits.items():
        if value < least:
            raise FieldError(name, f"must be at least {least}, got {value}")


def _random_tokens(model: HybridLM, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.layout.vocab_size, shape, generator=generator)
    return tokens.to(model.device)


@contextmanager
def _undisturbed(model: HybridLM) -> Iterator[None]:
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
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
