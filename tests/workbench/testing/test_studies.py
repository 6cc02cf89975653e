"""The `workbench_study` fixture: real studies in seconds, over classes and names alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from workbench import Metric, Placement
from workbench.errors import WorkbenchError
from workbench.records import Study
from workbench.testing.toy_layers import ToyMixer, ToyMLP

StudyOf = Callable[..., Study]


class Mine(ToyMixer):
    glyph = "m"


class Alternate(Placement):
    """Mixers in turn."""

    @classmethod
    def place(cls, num_layers, mixers, config):
        return tuple(mixers[index % len(mixers)] for index in range(num_layers))


class Depth(Metric):
    """Blocks."""

    unit = "blocks"
    stage = "static"
    label = "Depth"

    def measure(self, subject):
        return len(subject.layout.blocks)


def test_a_study_over_classes_that_nobody_registered(workbench_study: StudyOf) -> None:
    threads = torch.get_num_threads()
    study = workbench_study(
        layers=[Mine, "attention"],
        placement=Alternate,
        mlps=[ToyMLP],
        quantizers=["int8"],
        metrics=[Depth],
        num_layers=2,
        d_model=[32, 48, 64, 96],
        space={"layers": {"attention": {"num_heads": 2}}},
        seed=3,
    )
    assert isinstance(study, Study)
    assert study.summary()["outcomes"]["complete"] == 2
    for trial in study.trials():
        assert trial.pattern == "m.A."
        assert trial.metrics["tested-depth"] == 4
        assert trial.layout.blocks[0].quantizer.name == "int8"
        assert trial.layout.blocks[2].config["num_heads"] == 2
    assert study.data["config"]["seed"] == 3
    assert torch.get_num_threads() == threads


def test_data_is_a_name_or_a_table(workbench_study: StudyOf) -> None:
    study = workbench_study(
        data={"source": "mqar", "num_pairs": 4}, objectives=["accuracy"], trials=1
    )
    (trial,) = study.trials()
    assert 0 <= trial.metrics["accuracy"] <= 1


def test_a_class_inside_a_function_cannot_be_reached(workbench_study: StudyOf) -> None:
    class Local(ToyMixer):
        pass

    with pytest.raises(ValueError, match=r"cannot reach .*Local: define it at the top level"):
        workbench_study(layers=[Local])


def test_a_mistake_in_the_study_is_the_authors_to_see(workbench_study: StudyOf) -> None:
    with pytest.raises(WorkbenchError, match=r"unknown layer in space\.mixers 'mambo'"):
        workbench_study(layers=["mambo"])
