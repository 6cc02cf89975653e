"""Fills a latency table: single layers as the slope over copies of them, and whole models.

A layer's seconds are not those of the layer alone: norm, residual addition and launches belong to
it, and it runs between others. So a part is timed in models of some copies of it, and the slope
over the copies, by least squares, is its figure. All models of a part are timed in turns, several
rounds, so that what the machine does meanwhile hits them alike. Of each timing the fastest decile
counts, and of the rounds the fastest, for parts and whole models alike: what disturbs a call only
slows it, and a sum of disturbed parts would be disturbed many times over.

A few copies may lie in a GPU's last cache where a whole model does not: each call of a part begins
with that cache emptied (`cold`). Whole models are timed as they run.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

from workbench.builder import Builder
from workbench.clocks import Clock
from workbench.errors import FieldError
from workbench.latency_machine import Load
from workbench.latency_parts import OUTSIDE, LinkedCopiesError, Part, Parts, group, label
from workbench.latency_table import Entry, LatencyTable, Observation, Role
from workbench.layout import Layout
from workbench.measuring import (
    EAGER,
    Prefiller,
    Stepper,
    Timing,
    decode_time,
    eager,
    prefill_time,
    prefiller_of,
    stepper_of,
)
from workbench.model import HybridLM

Progress = Callable[[int, int, str], None]  # done, of how many, what comes now
Turn = dict[int, float]  # seconds by number of copies, of one round


class Timer(Protocol):
    """Times a model under a load; its name is part of what a table is for.

    `cold` asks for the time of a model of which nothing is in the device's last cache.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, model: HybridLM, load: Load, *, cold: bool = False) -> Timing: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelTimer:
    """The usual Timer: `prefill_time` and `decode_time`.

    Attributes:
        name: of how steps are run.
        stepper, prefiller: what runs them, and prefills.
        tokens: decode steps before the states are restored.
        repeats, min_seconds: of one timing, at least.
        clock: what tells the time, as in `time_calls`; the name must say so.
    """

    name: str = EAGER
    stepper: Stepper = eager
    prefiller: Prefiller | None = None
    tokens: int = 16
    repeats: int = 5
    min_seconds: float = 0.05
    clock: Callable[[torch.device], Clock] | None = None

    @classmethod
    def of(cls, steps: str, device: str) -> ModelTimer:
        """The timer of a way to run steps, one of `measuring.STEPS`.

        Raises:
            UnknownNameError: no such way.
        """
        name, stepper = stepper_of(steps, device)
        return cls(name=name, stepper=stepper, prefiller=prefiller_of(steps, device))

    def __call__(self, model: HybridLM, load: Load, *, cold: bool = False) -> Timing:
        if load.phase == "prefill":
            return prefill_time(
                model,
                load.batch_size,
                load.length,
                repeats=self.repeats,
                min_seconds=self.min_seconds,
                prefiller=self.prefiller,
                cold=cold,
                clock=self.clock,
            )
        return decode_time(
            model,
            load.batch_size,
            load.length,
            self.tokens,
            min_seconds=self.min_seconds,
            stepper=self.stepper,
            cold=cold,
            clock=self.clock,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filled:
    """What filling came to.

    Attributes:
        measured: new entries.
        failed: what could not be told, in words → why.
    """

    measured: int
    failed: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filler:
    """Measures what a table lacks.

    Attributes:
        table: of this machine and timer.
        builder: knows the layers.
        timer: how models are timed.
        device: where.
        copies: numbers of copies whose slope is taken; two at least.
        rounds: turns that the models of a part take, one after the other.
        passes: times that everything is gone through, so that the rounds of a part also lie far
            apart: a machine that others use is slow for minutes, not for milliseconds. Nothing is
            kept before the last.
        progress: told before each part and each model.
    """

    table: LatencyTable
    builder: Builder
    timer: Timer
    device: str = "cpu"
    copies: tuple[int, ...] = (2, 8)
    rounds: int = 3
    passes: int = 1
    progress: Progress = lambda done, total, what: None

    def __post_init__(self) -> None:
        if len(set(self.copies)) < 2 or min(self.copies) < 0:
            raise FieldError("copies", f"name two different numbers, got {list(self.copies)}")
        if self.timer.name != self.table.machine.timer:
            raise FieldError(
                "timer", f"{self.timer.name!r} cannot fill a table of {self.table.machine.timer!r}"
            )

    def fill(self, layouts: Iterable[Layout], loads: Sequence[Load]) -> Filled:
        """Measure exactly the entries that the layouts need and the table lacks; save each part.

        Raises:
            UnknownNameError, FieldError: as `Builder.resolve`.
            DiskError: the table cannot be written.
        """
        parts = Parts(self.builder)
        wanted = dict.fromkeys(part for layout in layouts for part in parts.of(layout))
        lacking = {
            part: missing
            for part in wanted
            if (missing := [load for load in loads if not self._known(parts, part, load)])
        }
        measured, failed = 0, {}
        seen: dict[tuple[Part, Load], list[Turn]] = {}
        for index in range(self.passes * len(lacking)):
            part = list(lacking)[index % len(lacking)]
            self.progress(index, self.passes * len(lacking), label(part))
            self._time(parts, part, lacking[part], seen)
            if index < (self.passes - 1) * len(lacking):
                continue
            for load in lacking[part]:
                figure = _entry(seen[part, load], parts.sources(part))
                if isinstance(figure, Entry):
                    self.table.put(part, load, figure)
                    measured += 1
                else:
                    failed[f"{label(part)}; {load}"] = figure
            self.table.save()
        return Filled(measured=measured, failed=failed)

    def _known(self, parts: Parts, part: Part, load: Load) -> bool:
        return self.table.find(part, load, parts.sources(part)) is not None

    def _time(
        self,
        parts: Parts,
        part: Part,
        loads: Sequence[Load],
        seen: dict[tuple[Part, Load], list[Turn]],
    ) -> None:
        """Add the rounds of a part under each load to what was seen of it."""
        if group(part) == OUTSIDE:
            models = {0: self._model(parts, part, 0)}
        else:
            try:
                models = {count: self._model(parts, part, count) for count in self.copies}
            except LinkedCopiesError:
                models = {count: self._model(parts, part, count) for count in (0, 1)}
        for load in loads:
            seen.setdefault((part, load), []).extend(
                {count: self.timer(model, load, cold=True).p10 for count, model in models.items()}
                for _ in range(self.rounds)
            )

    def _model(self, parts: Parts, part: Part, copies: int) -> HybridLM:
        return parts.model(part, copies, device=self.device, dtype=self._dtype).eval()

    def observe(self, layouts: Sequence[Layout], loads: Sequence[Load], role: Role) -> None:
        """Measure whole models and keep them in the table; those that it holds are not repeated.

        Raises:
            UnknownNameError, FieldError: as `Builder.resolve`.
            DiskError: the table cannot be written.
        """
        parts = Parts(self.builder)
        held = {(seen.layout.hash, seen.load, seen.sources) for seen in self.table.observations}
        lacking: dict[tuple[Layout, str], list[Load]] = {}
        for layout in map(self.builder.resolve, layouts):
            sources = parts.layout_sources(layout)
            if missing := [load for load in loads if (layout.hash, load, sources) not in held]:
                lacking[layout, sources] = missing
        seen: dict[tuple[Layout, Load], list[float]] = {}
        for index in range(self.passes * len(lacking)):
            (layout, sources), missing = list(lacking.items())[index % len(lacking)]
            self.progress(index, self.passes * len(lacking), f"whole model {layout.hash}")
            self._time_whole(layout, missing, seen)
            if index < (self.passes - 1) * len(lacking):
                continue
            for load in missing:
                seconds = seen[layout, load]
                self.table.observations.append(
                    Observation(
                        layout=layout,
                        load=load,
                        seconds=min(seconds),
                        spread=max(seconds) / min(seconds) - 1,
                        role=role,
                        sources=sources,
                    )
                )
            self.table.save()

    def _time_whole(
        self, layout: Layout, loads: Sequence[Load], seen: dict[tuple[Layout, Load], list[float]]
    ) -> None:
        model = self.builder.build(layout, device=self.device, dtype=self._dtype).eval()
        self.builder.quantize(model)
        for load in loads:
            seconds = [self.timer(model, load).p10 for _ in range(self.rounds)]
            seen.setdefault((layout, load), []).extend(seconds)

    @property
    def _dtype(self) -> Any:
        return getattr(torch, self.table.machine.dtype)


def _entry(turns: Sequence[Turn], sources: str) -> Entry | str:
    """What the rounds of a part come to, or why it cannot be told."""
    figure = _per_copy({count: min(turn[count] for turn in turns) for count in turns[0]})
    if figure <= 0:
        return (
            f"more copies were not slower ({figure:.3g} s a copy): measure on a quieter "
            "machine, or with more copies"
        )
    each = [_per_copy(turn) for turn in turns]
    return Entry(seconds=figure, spread=(max(each) - min(each)) / figure, sources=sources)


def _per_copy(seconds: Turn) -> float:
    return slope(seconds) if len(seconds) > 1 else next(iter(seconds.values()))


def slope(seconds: Turn) -> float:
    """Seconds a copy, by least squares over the numbers of copies."""
    counts, times = list(seconds), list(seconds.values())
    mean_count, mean_time = statistics.fmean(counts), statistics.fmean(times)
    above = sum((n - mean_count) * (t - mean_time) for n, t in zip(counts, times, strict=True))
    return above / sum((count - mean_count) ** 2 for count in counts)
