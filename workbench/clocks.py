"""Clocks of a timing: the wall's, this process's, or a CUDA device's own."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch

from workbench.errors import WorkbenchError


class Clock:
    """Marks moments; `read` gives the seconds from each mark to the next, and forgets them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        self.marks.append(time.perf_counter())

    def read(self) -> list[float]:
        seconds = [end - start for start, end in itertools.pairwise(self.marks)]
        self.marks = []
        return seconds


class ProcessorClock(Clock):
    """CPU seconds of this process: what others take of a busy machine is not in them.

    For one thread only, and never to be compared with the wall's seconds.
    """

    def mark(self) -> None:
        self.marks.append(time.process_time())


class _DeviceClock(Clock):
    """Events in the queue of a CUDA device: reading waits for them, marking does not."""

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        self.marks.append(event)

    def read(self) -> list[float]:
        torch.cuda.synchronize(self.device)
        pairs = itertools.pairwise(self.marks)
        seconds = [start.elapsed_time(end) / 1000 for start, end in pairs]
        self.marks = []
        return seconds


def clock_of(device: torch.device) -> Clock:
    clocks = {"cpu": Clock, "cuda": _DeviceClock}
    if device.type not in clocks:
        raise WorkbenchError(f"cannot time on {device.type!r}: use {' or '.join(clocks)}")
    return clocks[device.type](device)
