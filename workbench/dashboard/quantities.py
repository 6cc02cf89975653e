"""Metrics with their units, directions and origins, as axes, columns and cards show them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from workbench.figures import figure
from workbench.records import Study

BYTES = ("bytes", "KiB", "MiB", "GiB", "TiB")
COUNTS = ("parameters", "FLOPs", "FLOPs/token", "bytes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantity:
    """A metric as a study records it.

    Attributes:
        name: of the metric.
        unit: of recorded values.
        direction: which way is better; None for a metric that is no objective.
        stage: the stage of a trial that yields it (`workbench.metric.STAGES`); None where the
            study's record does not say.
    """

    name: str
    unit: str = ""
    direction: str | None = None
    stage: str | None = None

    @property
    def sign(self) -> float:
        """1 to minimize, -1 to maximize."""
        return -1.0 if self.direction == "maximize" else 1.0

    def scale(self, largest: float) -> tuple[float, str]:
        """The divisor and the unit in which values up to `largest` read well."""
        power = 0
        if self.unit == "bytes":
            while abs(largest) >= 1024 ** (power + 1) and power + 1 < len(BYTES):
                power += 1
            return float(1024**power), BYTES[power]
        return 1.0, self.unit

    def heading(self, unit: str) -> str:
        """The name with a unit in brackets, unless the name says it."""
        words = f"_{unit.replace('/', '_per_')}_"
        said = not unit or words in f"_{self.name}_"
        return self.name if said else f"{self.name} [{unit}]"

    def text(self, value: float | None) -> str:
        """One value with its unit."""
        # These units are in the scaled figure itself, or its name says them.
        unit = "" if self.unit in COUNTS and self.unit != "FLOPs/token" else self.unit
        return f"{figure(value, self.unit)} {unit}".strip()


def quantities(study: Study) -> dict[str, Quantity]:
    """Every metric of a study by name: its objectives first, in the order of its file."""
    directions = {objective.name: objective.direction for objective in study.objectives}
    stages: Mapping[str, Any] = study.data.get("stages", {})
    return {
        name: Quantity(
            name=name,
            unit=study.units.get(name, ""),
            direction=directions.get(name),
            stage=stages.get(name),
        )
        for name in dict.fromkeys([*directions, *study.units])
    }


TRIAL = Quantity(name="trial")  # a trial's number, as an axis: how the search went on


def default_axes(metrics: Mapping[str, Quantity]) -> tuple[Quantity, Quantity, Quantity | None]:
    """x, y and colour to begin with: the second, the first and the third objective."""
    objectives = [quantity for quantity in metrics.values() if quantity.direction is not None]
    x = objectives[1] if len(objectives) > 1 else TRIAL
    return x, objectives[0], objectives[2] if len(objectives) > 2 else None
