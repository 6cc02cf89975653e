"""At what context, batch and bytes an element a layout is described: given, or as its study counts.

A study's figures of memory are counted under `[metrics.NAME]`; a description of one of its trials
uses the same, so that the two agree.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from workbench import config as configs
from workbench.costs import DTYPE_BYTES

if TYPE_CHECKING:
    from workbench.builder import Builder
    from workbench.study_config import StudyConfig

NAMES = {
    "context": "context",
    "batch_size": "batch size",
    "bytes_per_element": "bytes an element",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditions:
    """What the figures of a Description hold for.

    Attributes:
        context: tokens of a sequence at which FLOPs and state bytes are given.
        batch_size: sequences whose states are held.
        bytes_per_element: of weights that no quantizer stores, and of caches.
        source: what set the fields of `taken` (`memory_bytes of study quickstart`).
        taken: fields that are neither defaults nor the caller's.
    """

    context: int = 2048
    batch_size: int = 1
    bytes_per_element: int = 2
    source: str = ""
    taken: tuple[str, ...] = ()

    def given(self, **values: int | None) -> Conditions:
        """With what the caller asked for in place of the rest; None leaves a value."""
        asked: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        taken = tuple(name for name in self.taken if name not in asked)
        return dataclasses.replace(self, taken=taken, **asked)

    @property
    def origin(self) -> str:
        """Which of them came from where, in words; empty for none."""
        if not self.taken:
            return ""
        *most, last = (NAMES[name] for name in self.taken)
        names = f"{', '.join(most)} and {last}" if most else last
        return f"{names[0].upper()}{names[1:]} as in {self.source}"


def conditions_of(study: StudyConfig, builder: Builder) -> Conditions:
    """How a study counts: as the static metric that says most about it, else as it trains.

    Models are trained and measured in float32 where no metric says otherwise.
    """
    best: dict[str, Any] = {}
    source = f"study {study.name}"
    for name in study.metric_names:
        # A plugin that is gone takes nothing from what the other metrics say.
        if name not in builder.metrics or builder.metrics[name].stage != "static":
            continue
        config: Any = configs.from_dict(builder.metrics[name].Config, study.metrics.get(name, {}))
        said = {
            field: getattr(config, field)
            for field in ("context", "batch_size", "dtype")
            if hasattr(config, field)
        }
        if len(said) > len(best):
            best, source = said, f"{name} of study {study.name}"
    best["bytes_per_element"] = DTYPE_BYTES[best.pop("dtype", "float32")]
    return Conditions(source=source, taken=tuple(name for name in NAMES if name in best), **best)
