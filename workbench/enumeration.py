"""Every layout of a finite search space, each once, with parameters that suggest it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

from workbench.errors import FieldError, WorkbenchError
from workbench.layout import Layout
from workbench.space import Space

LIMIT = 500
PATIENCE = 40  # suggestions a layout of the limit that are tried before counting is given up


@dataclasses.dataclass(frozen=True)
class Suggested:
    """A layout and the first parameters, depth first, that suggest it."""

    layout: Layout
    params: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Enumeration:
    """A whole space.

    Attributes:
        layouts: every distinct one that can be built, in an order that depends on the space alone.
        suggestions: how many combinations of parameters there are.
        refused: how many of them cannot be built, by reason.
    """

    layouts: tuple[Suggested, ...]
    suggestions: int
    refused: dict[str, int]

    @property
    def duplicates(self) -> int:
        """Combinations that make the layout of an earlier one."""
        return self.suggestions - len(self.layouts) - sum(self.refused.values())


def enumerate_space(space: Space, limit: int = LIMIT) -> Enumeration:
    """Every distinct layout of a space.

    Args:
        limit: of distinct layouts.

    Raises:
        FieldError: a parameter is continuous; names it.
        WorkbenchError: the space has more layouts than the limit; says how many.
    """
    found: dict[str, Suggested] = {}
    refused: Counter[str] = Counter()
    suggestions = 0
    for script in _scripts():
        try:
            layout = space.suggest(script)
        except ContinuousError:
            raise
        except WorkbenchError as error:
            refused[str(error)] += 1
        except Exception as error:  # a policy or layer of a plugin may raise anything
            refused[f"{type(error).__name__}: {error}"] += 1
        else:
            found.setdefault(layout.hash, Suggested(layout, dict(script.params)))
        suggestions += 1
        if suggestions > PATIENCE * limit:
            raise _too_large(f"more than {suggestions - 1:,} combinations of parameters", limit)
    if len(found) > limit:
        raise _too_large(f"{len(found):,} layouts", limit)
    return Enumeration(tuple(found.values()), suggestions, dict(refused))


def _too_large(size: str, limit: int) -> WorkbenchError:
    return WorkbenchError(
        f"the space has {size}, too many to judge each (the limit is {limit:,} layouts): offer "
        "fewer choices, or raise the limit if the time is there."
    )


class ContinuousError(FieldError):
    """A parameter with values that cannot be counted."""


class Script:
    """Answers a space's questions by a list of indices, then with first values.

    Args:
        path: which of its values each parameter takes, in the order in which they are asked for.

    Attributes:
        params: the answers.
        sizes: how many values each had, in the same order.
    """

    def __init__(self, path: Sequence[int] = ()) -> None:
        self.path = [*path]
        self.params: dict[str, Any] = {}
        self.sizes: list[int] = []

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._answer(name, choices)

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        return int(self._answer(name, range(low, high + 1, step)))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        if step is None and low < high:
            raise ContinuousError(
                name,
                f"is continuous ({low:g} to {high:g}), so its layouts cannot be counted: give it a "
                "list, a step or one value in [space]",
            )
        return float(self._answer(name, _steps(low, high, step) if step else [low]))

    def _answer(self, name: str, values: Sequence[Any]) -> Any:
        if name not in self.params:
            index = len(self.sizes)
            if index == len(self.path):
                self.path.append(0)
            self.sizes.append(len(values))
            self.params[name] = values[self.path[index]]
        return self.params[name]

    def next_path(self) -> list[int] | None:
        """The next path depth first; None after the last."""
        path = [*self.path]
        while path and path[-1] + 1 == self.sizes[len(path) - 1]:
            path.pop()
        return [*path[:-1], path[-1] + 1] if path else None


def _steps(low: float, high: float, step: float) -> list[float]:
    """The values that Optuna draws, to the last bit: none is above the last whole step."""
    exact_low, exact_step = Decimal(str(low)), Decimal(str(step))
    last = int((Decimal(str(high)) - exact_low) // exact_step)
    top = float(exact_low + last * exact_step)
    return [min(low + index * step, top) for index in range(last + 1)]


def _scripts() -> Iterator[Script]:
    """A script for each combination, as long as the one before was used."""
    path: list[int] | None = []
    while path is not None:
        script = Script(path)
        yield script
        path = script.next_path()
