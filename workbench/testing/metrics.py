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
from workbench.metric import STAGES, Metric, Subject
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
        """Unit, label, stage and direction are set; the configs are instances of `Config`."""
        assert self.metric.unit, "say the unit of the figure"
        assert self.metric.label, "say in one line what it is"
        assert self.metric.stage in STAGES
        assert self.metric.direction in ("minimize", "maximize")
        for config in self.configs:
            assert isinstance(config, self.metric.Config)

    def test_gives_a_figure(self, config: Any, tmp_path: Path) -> None:
        """A finite number, with numbers beside it; the same again unless it is measured."""
        subject = self.subject(tmp_path)
        figure = self.metric(config).measure(subject)
        for name, value in {"the figure": figure, **subject.extras}.items():
            assert isinstance(value, float | int), f"{name} is {value!r}"
            assert not isinstance(value, bool), f"{name} is {value!r}"
            assert math.isfinite(value), f"{name} is {value!r}"
        if self.metric.stage != "measured":
            assert self.metric(config).measure(self.subject(tmp_path)) == figure

    def test_needs_no_more_than_its_stage_has(self, config: Any, tmp_path: Path) -> None:
        """A static metric needs the layout alone; any other says what it lacks."""
        full = self.subject(tmp_path)
        without = dataclasses.replace(full, model=None, data=None, extras={})
        metric = self.metric(config)
        if self.metric.stage == "static":
            assert metric.measure(without) == metric.measure(full)
        else:
            with pytest.raises(WorkbenchError):
                metric.measure(without)

    def test_leaves_the_model_alone(self, config: Any, tmp_path: Path) -> None:
        """Weights, training mode, gradients and torch's global generator are as before."""
        subject = self.subject(tmp_path)
        model = subject.built
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        generator_state = torch.get_rng_state()
        for training in (True, False):
            model.train(training)
            self.metric(config).measure(self._again(subject))
            assert model.training == training
        assert torch.equal(torch.get_rng_state(), generator_state), "the global generator moved"
        assert torch.is_grad_enabled(), "gradients are off afterwards"
        assert all(parameter.grad is None for parameter in model.parameters())
        after = model.state_dict()
        assert list(after) == list(weights)
        assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())

    def _again(self, subject: Subject) -> Subject:
        return dataclasses.replace(subject, extras={})
