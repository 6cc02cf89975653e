"""MetricContract: the tests that any metric must pass."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from workbench.config import NoConfig
from workbench.errors import WorkbenchError
from workbench.guard import Guard
from workbench.metric import STAGES, Metric, Subject
from workbench.testing.advice import concerns
from workbench.testing.configs import ConfigContract
from workbench.testing.toys import ToyText, toy_builder, toy_layout


class MetricContract(ConfigContract):
    """What trials rely on in a metric.

        class TestMyMetric(MetricContract):
            metric = MyMetric
            configs = [MyMetric.Config()]

    Class attributes:
        metric: the class under test.
        configs: Config instances.

    Override `subject` for a metric that cannot judge the toys (a small recurrent model and
    made-up sentences as bytes).
    """

    under_test = "metric"
    metric: ClassVar[type[Metric]]

    def subject(self, folder: Path) -> Subject:
        """What is measured: everything there, as in the last stage of a trial."""
        builder = toy_builder()
        layout = builder.resolve(toy_layout())
        return Subject(
            layout=layout,
            builder=builder,
            model=builder.build(layout).eval(),
            data=ToyText(NoConfig(), cache_dir=folder),
            batch_size=16,
            length=32,
        )

    def test_class_attributes(self) -> None:
        """Unit, label, stage and direction are set; the configs are instances of `Config`.

        Mend: Set `unit`, `label`, `stage` and `direction` on the class.
        """
        assert self.metric.unit, "say the unit of the figure"
        assert self.metric.label, "say in one line what it is"
        assert self.metric.stage in STAGES
        assert self.metric.direction in ("minimize", "maximize")
        for config in self.configs:
            assert isinstance(config, self.metric.Config)

    @concerns("measure")
    def test_gives_a_figure(self, config: Any, tmp_path: Path) -> None:
        """A finite number, with numbers beside it; the same again unless it is measured.

        Mend: Return a finite int or float, and put only numbers into `subject.extras`; if the
        figure varies from run to run, its stage is `measured`.
        """
        subject = self.subject(tmp_path)
        figure = self.metric(config).measure(subject)
        for name, value in {"the figure": figure, **subject.extras}.items():
            assert isinstance(value, float | int), f"{name} is {value!r}"
            assert not isinstance(value, bool), f"{name} is {value!r}"
            assert math.isfinite(value), f"{name} is {value!r}"
        if self.metric.stage != "measured":
            assert self.metric(config).measure(self.subject(tmp_path)) == figure

    @concerns("measure")
    def test_needs_no_more_than_its_stage_has(self, config: Any, tmp_path: Path) -> None:
        """A static or synthetic metric needs the layout alone; any other says what it lacks.

        Mend: A static metric reads `subject.layout` and `subject.costs` only; a synthetic one
        builds a model of its own (`workbench.synthetic.learn`); any other gets at the model through
        `subject.built` and at losses through `subject.evaluation`, which refuse where there is
        none.
        """
        full = self.subject(tmp_path)
        without = dataclasses.replace(full, model=None, data=None, extras={})
        metric = self.metric(config)
        if self.metric.stage in ("static", "synthetic"):
            assert metric.measure(without) == metric.measure(full)
        else:
            with pytest.raises(WorkbenchError):
                metric.measure(without)

    @concerns("measure")
    def test_leaves_the_model_alone(self, config: Any, tmp_path: Path) -> None:
        """Weights, training mode, gradients and what all plugins share are as before.

        Mend: Measure under `torch.no_grad()` and `torch.random.fork_rng()`, on a copy if weights
        must change, and restore the training mode.
        """
        subject = self.subject(tmp_path)
        model = subject.built
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        guard, generator_state = Guard(), torch.get_rng_state()
        for training in (True, False):
            model.train(training)
            self.metric(config).measure(self._again(subject))
            assert model.training == training, f"it was measured with training = {training}"
        moved = not torch.equal(torch.get_rng_state(), generator_state)
        changes = guard.restore()
        assert not changes, changes[0].what
        assert not moved, "the global generator moved"
        assert all(parameter.grad is None for parameter in model.parameters()), "gradients are left"
        after = model.state_dict()
        assert list(after) == list(weights), "the model has other weights afterwards"
        for name, tensor in weights.items():
            assert torch.equal(after[name], tensor), f"{name} changed"

    def _again(self, subject: Subject) -> Subject:
        return dataclasses.replace(subject, extras={})
