"""Which faults a study meets, in which order: drawn from a seed, so that a run can be repeated."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping

# Where in a trial a worker can be hit. `weights`: the file is written and not yet renamed.
STAGES = (
    "constructor", "measured", "forward", "checkpoint", "rung", "weights", "trained", "quantized"
)  # fmt: skip
# Where a study's process can be hit: around each write to its books, and while a trial is paused at
# a rung, before and after it is on record whether that trial goes on.
RUNG_POINTS = ("paused", "decided")
POINTS = ("asked", "claimed", "writing", "telling", "told", *RUNG_POINTS)
STEPS = 4  # of each part of a training: a fault in `forward` or at a checkpoint is before the last
PLACES: dict[str, tuple[str, ...]] = {
    "worker killed": STAGES,
    "worker exits": STAGES,
    "sys.exit": ("constructor", "measured", "forward", "trained", "quantized"),
    "hang": ("constructor", "measured", "forward", "trained"),
    "out of memory": ("constructor", "forward", "rung", "quantized"),
    "NaN": ("forward", "measured", "rung", "quantized"),
    "plugin raises": ("constructor", "measured", "forward", "rung", "trained", "quantized"),
    "worker's clock jumps": STAGES,
    "parent killed": (*POINTS, "forward", "checkpoint", "rung", "weights", "quantized"),
    "disk full": ("forward", "checkpoint", "weights", "measured"),
    "storage away": (*POINTS, "forward", "weights"),
    "parent's clock jumps": POINTS,
    # Of a trial that is paused at a rung: of its worker, and of what it left.
    "idle worker killed": RUNG_POINTS,
    "checkpoint damaged": ("decided",),
    "checkpoint gone": ("decided",),
}
SHAPES = {"out of memory": ("MemoryError", "torch", "allocator", "limit")}
# What the trial's record says of a fault in its worker.
OUTCOMES = {
    "worker killed": "crashed",
    "worker exits": "crashed",
    "sys.exit": "error",
    "hang": "timeout",
    "out of memory": "out_of_memory",
    "NaN": "diverged",
    "plugin raises": "error",
    "worker's clock jumps": "complete",
    "parent killed": "interrupted",
    "disk full": "interrupted",
    "storage away": "complete",
    "idle worker killed": "complete",
    "checkpoint damaged": "complete",
    "checkpoint gone": "complete",
}
AGAIN = ("crashed", "interrupted")  # the trial runs again, and uses up no budget


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        number: its place in the schedule.
        place: a stage of a trial, or a point of a study's process.
        after: hits at the so-manieth time that the place is reached.
        seconds: how long what passes lasts, or how far a clock jumps.
        shape: of an `out of memory`.
    """

    number: int
    kind: str
    place: str
    after: int
    seconds: float
    shape: str = ""

    @property
    def in_worker(self) -> bool:
        return self.place in STAGES


def draw(seed: int, counts: Mapping[str, int]) -> list[Fault]:
    """A schedule with so many faults of each kind, in random order and at random places.

    A kind strikes at each of its places before it strikes at one again.
    """
    chance = random.Random(seed)
    drawn = [
        (kind, places[index % len(places)])
        for kind, count in counts.items()
        for places in [chance.sample(PLACES[kind], len(PLACES[kind]))]
        for index in range(count)
    ]
    chance.shuffle(drawn)
    return [_drawn(chance, number, *what) for number, what in enumerate(drawn)]


def _drawn(chance: random.Random, number: int, kind: str, place: str) -> Fault:
    after = 1
    if place in ("forward", "checkpoint"):
        after = chance.randint(1, STEPS - 1)
    elif place in POINTS and place not in RUNG_POINTS:
        after = chance.randint(1, 2)
    jumps = "clock" in kind
    seconds = chance.choice((-1, 1)) * chance.uniform(60, 1e6) if jumps else chance.uniform(0.3, 1)
    return Fault(number, kind, place, after, seconds, chance.choice(SHAPES.get(kind, ("",))))


def needed(faults: list[Fault]) -> int:
    """How many judged trials the faults in workers use up, if each has a trial of its own."""
    return sum(fault.in_worker and OUTCOMES[fault.kind] not in AGAIN for fault in faults)
