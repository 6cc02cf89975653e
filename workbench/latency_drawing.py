"""Layouts at random from a study's space, to fill, fit and check a latency model with."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from workbench.errors import FieldError
from workbench.layout import Layout
from workbench.space import Space

TRIES = 20  # draws a layout that is wanted: some repeat, some cannot be built


class RandomSuggester:
    """Suggests values evenly over each range, as a sampler without a model would."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self.dice.choice(choices)

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        if log:
            return round(math.exp(self.dice.uniform(math.log(low), math.log(high))))
        return self.dice.randrange(low, high + 1, step)

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None, log: bool
    ) -> float:
        if log:
            value = math.exp(self.dice.uniform(math.log(low), math.log(high)))
        elif step is None:
            value = self.dice.uniform(low, high)
        else:
            value = low + step * self.dice.randrange(math.floor((high - low) / step + 1e-9) + 1)
        return min(max(value, low), high)  # 3 * 0.1 is more than 0.3


def draw_layouts(
    space: Space,
    count: int,
    seed: int = 0,
    refused: Callable[[FieldError], None] | None = None,
) -> list[Layout]:
    """At most `count` different layouts of a space, each resolved; fewer from a small space.

    Args:
        refused: is told of each draw whose values do not fit together.
    """
    suggester = RandomSuggester(random.Random(seed))
    found: dict[str, Layout] = {}
    for _ in range(TRIES * count):
        if len(found) == count:
            break
        try:
            layout = space.suggest(suggester)
        except FieldError as error:  # values that do not fit together
            if refused is not None:
                refused(error)
            continue
        found.setdefault(layout.hash, layout)
    return list(found.values())
