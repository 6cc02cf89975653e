"""MetricContract passes on an honest metric, and each of its tests finds its fault."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path

import pytest
import torch

from tests.workbench.testing.running import failure, suite_tests
from workbench.config import NoConfig
from workbench.errors import WorkbenchError
from workbench.metric import Metric
from workbench.testing import MetricContract


class Accuracy(Metric):
    unit = "share"
    direction = "maximize"
    stage = "trained"
    label = "Accuracy"

    def measure(self, subject):
        return subject.evaluation.accuracy


class TestAccuracy(MetricContract):
    metric = Accuracy
    configs = (NoConfig(),)


class Nan(Accuracy):
    def measure(self, subject):
        return math.nan


class TensorFigure(Accuracy):
    def measure(self, subject):
        return torch.tensor(super().measure(subject))


class TextBeside(Accuracy):
    def measure(self, subject):
        subject.extras["backend"] = "cpu"
        return super().measure(subject)


class Throws(Accuracy):
    def measure(self, subject):
        return super().measure(subject) + random.random()


class MakesAFigureUp(Accuracy):
    def measure(self, subject):
        return 0.5 if subject.model is None else super().measure(subject)


class StaticThatBuilds(Accuracy):
    stage = "static"


class LeavesTrainingMode(Accuracy):
    def measure(self, subject):
        subject.built.eval()
        return super().measure(subject)


class MovesTheGenerator(Accuracy):
    def measure(self, subject):
        torch.rand(())
        return super().measure(subject)


class TouchesWeights(Accuracy):
    def measure(self, subject):
        with torch.no_grad():
            subject.built.embedding.weight.mul_(1.001)
        return super().measure(subject)


class LeavesGradients(Accuracy):
    def measure(self, subject):
        subject.built.embedding.weight.square().sum().backward()
        return super().measure(subject)


class NoUnit(Accuracy):
    unit = ""


class InfiniteLimit(Accuracy):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        limit: float = math.inf


FAULTS: list[tuple[type[Metric], str]] = [
    (Nan, "test_gives_a_figure"),
    (TensorFigure, "test_gives_a_figure"),
    (TextBeside, "test_gives_a_figure"),
    (Throws, "test_gives_a_figure"),
    (MakesAFigureUp, "test_needs_no_more_than_its_stage_has"),
    (StaticThatBuilds, "test_needs_no_more_than_its_stage_has"),
    (LeavesTrainingMode, "test_leaves_the_model_alone"),
    (MovesTheGenerator, "test_leaves_the_model_alone"),
    (TouchesWeights, "test_leaves_the_model_alone"),
    (LeavesGradients, "test_leaves_the_model_alone"),
    (NoUnit, "test_class_attributes"),
    (InfiniteLimit, "test_config_is_plain_data"),
]

RAISES = {
    "test_config_is_plain_data": "ValueError",
    "test_needs_no_more_than_its_stage_has": ("Failed: DID NOT RAISE", "WorkbenchError"),
}


@pytest.mark.parametrize(
    ("metric", "test"), FAULTS, ids=[f"{thing.__name__}-{test[5:]}" for thing, test in FAULTS]
)
def test_each_fault_is_found(metric: type[Metric], test: str, tmp_path: Path) -> None:
    message = failure(MetricContract, test, tmp_path, metric=metric, configs=(metric.Config(),))
    assert message.startswith(RAISES.get(test, "AssertionError"))


def test_every_test_of_the_suite_has_a_fault() -> None:
    assert suite_tests(MetricContract) == {test for _, test in FAULTS}


def test_a_subject_may_be_replaced(tmp_path: Path) -> None:
    """A metric that cannot judge the toys gets a subject of its own."""

    class OnOtherDevices(MetricContract):
        metric = Accuracy
        configs = (NoConfig(),)

        def subject(self, folder):
            raise WorkbenchError("no such device here")

    message = failure(OnOtherDevices, "test_gives_a_figure", tmp_path)
    assert message == "WorkbenchError: no such device here"
