"""The Metric contract: one figure of a trial, with unit, direction and the stage that yields it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from workbench.config import NoConfig
from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from workbench.builder import Builder
    from workbench.costs import Costs
    from workbench.data import Batch, DataSource
    from workbench.evaluation import Evaluation
    from workbench.layout import Layout
    from workbench.model import HybridLM
    from workbench.training_config import TrainingConfig

Stage = Literal["static", "measured", "synthetic", "trained", "quantized"]
STAGES: tuple[Stage, ...] = ("static", "measured", "synthetic", "trained", "quantized")
UNTRAINED: tuple[Stage, ...] = ("static", "measured", "synthetic")  # known before the training


class Metric(ABC):
    """A named figure. One instance measures many subjects.

    Class attributes to set:
        Config: a frozen dataclass; a study sets it under `[metrics.NAME]`.
        unit: of the figure (`"ms"`, `"bytes"`, `"bits/byte"`).
        direction: which way is better.
        stage: when a trial can know it, from cheap to dear: `"static"` from the layout alone;
            `"measured"` on the built model, untrained; `"synthetic"` from the layout, by a small
            training of the metric's own on another task (`workbench.synthetic`); `"trained"` after
            training, weights as trained; `"quantized"` after training on the weights as they will
            be stored.
        label: one line for people.
        at_rungs: whether a figure of the quantized stage may also be had, at a rung, of the partly
            trained and unquantized model, to compare it with other trials' there.
    """

    Config: ClassVar[type] = NoConfig
    unit: ClassVar[str] = ""
    direction: ClassVar[Literal["minimize", "maximize"]] = "minimize"
    stage: ClassVar[Stage]
    label: ClassVar[str] = ""
    at_rungs: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        self.config = config

    def check(self, batch: Batch) -> None:  # noqa: B027 - most metrics can always be had
        """Refuse a study on whose data this metric can never be had, before any work.

        Args:
            batch: one of the validation part.

        Raises:
            WorkbenchError: says which data or metric to choose instead.
        """

    @abstractmethod
    def measure(self, subject: Subject) -> float:
        """The figure for one subject, in `unit`.

        Raises:
            WorkbenchError: it cannot be had here (no such counter on this device, say): the
                trial records why; never return a made-up figure.
        """


@dataclasses.dataclass
class Subject:
    """What a metric may look at; which parts are there depends on the stage.

    Attributes:
        layout: resolved, every default written out.
        builder: the registries that know its layers.
        device: where the trial runs.
        model: None in the static and synthetic stages.
        data: None where the study trains nothing.
        training: the study's; None where it trains nothing.
        seed: of the trial's weights and data order.
        batch_size, length: of evaluation batches.
        extras: figures that a metric adds to the record beside its own (spread, say).
        notes: words that it adds: how the figure was had (`steps="cuda graph"`, say).
    """

    layout: Layout
    builder: Builder
    device: str = "cpu"
    model: HybridLM | None = None
    data: DataSource | None = None
    training: TrainingConfig | None = None
    seed: int = 0
    batch_size: int = 8
    length: int = 256
    extras: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def built(self) -> HybridLM:
        """The model, or a WorkbenchError in a stage that has none."""
        if self.model is None:
            raise WorkbenchError(
                "this metric needs a built model: its stage cannot be 'static' or 'synthetic'"
            )
        return self.model

    def costs(self, length: int) -> Costs:
        """Exact costs of the layout at a context of `length` tokens."""
        return self.builder.costs(self.layout, length=length).total

    @cached_property
    def evaluation(self) -> Evaluation:
        """One pass over the validation part, shared by all metrics that need it."""
        from workbench.evaluation import evaluate

        if self.data is None:
            raise WorkbenchError("this metric needs a data source: give the study a [data] table")
        return evaluate(self.built, self.data, self.batch_size, self.length)
