"""Overhead is what lies between naps and is nobody's work, however unequal the work is."""

from __future__ import annotations

import random

import pytest

from benchmarks.overhead import Ends, Parts, Work, overhead, worked


@pytest.mark.parametrize("beyond", [0.0, 0.25])
@pytest.mark.parametrize("first", [0.0, 30.0])
def test_overhead_is_what_was_put_in(beyond: float, first: float) -> None:
    """As where a worker's first training takes longer than all others: that is work."""
    dice = random.Random(0)
    ends: Ends = {}
    work: Work = {}
    for process in range(3):
        clock, ends[process] = dice.random(), []
        for trial in range(5):
            key, before = f"{process}.{trial}", 1 + dice.random()
            after = dice.random() + (first if trial == 0 else 0.0)
            clock += beyond + before
            ends[process].append((key, clock))
            work[key] = (before, after)
            clock += after
    count, inside, found = overhead(ends, work)
    assert count == 12
    assert found == pytest.approx(beyond, abs=1e-9)
    spent = sum(naps[-1][1] - naps[0][1] for naps in ends.values()) / count
    assert inside == pytest.approx(spent - beyond)


def test_all_stages_but_the_static_one_are_work() -> None:
    stages = {"static": 9.0, "measured": 1.0, "training": 2.0, "trained": 3.0, "quantized": 4.0}
    assert worked(stages) == (1.0, 9.0)


class Kitchen:
    """Two functions, one inside the other."""

    def cook(self) -> int:
        return self.chop() + sum(range(2_000_000))

    def chop(self) -> int:
        return sum(range(1_000_000))


def test_a_part_does_not_hold_the_parts_inside_it() -> None:
    parts, kitchen = Parts(), Kitchen()
    parts.watch(kitchen, "chop", "chopping")
    parts.watch(kitchen, "cook", "cooking")
    assert kitchen.cook() == sum(range(1_000_000)) + sum(range(2_000_000))
    assert set(parts.seconds) == {"chopping", "cooking"}
    assert parts.seconds["cooking"] > parts.seconds["chopping"] > 0
