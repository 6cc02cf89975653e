"""Study files: what is refused, and in which words."""

from __future__ import annotations

import pytest

from tests.workbench.conftest import make_config
from workbench import WorkbenchError
from workbench.study_config import Bounds, StudyConfig

TOML = """
name = "tiny"
objectives = ["toy_loss"]
[space]
d_model = [8]
num_layers = [1]
mixers = ["toy"]
placements = ["alternate"]
[data]
source = "counting"
[training]
tokens = 512
[budget]
trials = 1
"""


def test_a_file_becomes_a_study(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text('plugin_dirs = ["mine"]\n' + TOML)
    study = StudyConfig.read(path)
    assert study.name == "tiny"
    assert study.space.mixers == ("toy",)
    assert study.budget.trials == 1
    assert study.plugin_dirs == (str(tmp_path / "mine"),)


def test_json_round_trip(study_data):
    study = make_config(study_data, constraints={"toy_weights": {"max": 10}})
    assert StudyConfig.from_dict(study.to_dict()) == study


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nmae": "x"}, ["nmae", "Did you mean 'name'"]),
        ({"name": "a/b"}, ["name", "letters"]),
        ({"objectives": []}, ["objectives", "at least one"]),
        ({"objectives": ["a", "a"]}, ["objectives", "twice"]),
        ({"objectives": "a"}, ["objectives", "expected"]),
        ({"seed": -1}, ["seed"]),
        ({"seed": "one"}, ["seed", "int"]),
        ({"budget.trials": 0}, ["budget.trials", "at least 1"]),
        ({"budget.trails": 3}, ["trails", "Did you mean 'trials'"]),
        ({"budget.trial_timeout": -1.0}, ["trial_timeout", "above 0"]),
        ({"budget": 3}, ["budget", "table"]),
        ({"data": {}}, ["data.source"]),
        ({"data": 3}, ["data", "table"]),
        ({"runtime.executor": "procss"}, ["procss", "Did you mean 'process'"]),
        ({"constraints": {"toy_weights": 3}}, ["constraints.toy_weights", "max"]),
        ({"constraints": {"toy_weights": {"mux": 3}}}, ["mux", "max"]),
        ({"constraints": {"toy_weights": {"min": 3, "max": 2}}}, ["above max"]),
        ({"metrics": {"toy_los": {}}}, ["toy_los", "Did you mean 'toy_loss'"]),
        ({"space.mixer": []}, ["mixer", "Did you mean 'mixers'"]),
        ({"space.mixers": "toy"}, ["space.mixers", "expected"]),
    ],
)
def test_mistakes_name_the_field(study_data, change, words):
    with pytest.raises(WorkbenchError) as caught:
        make_config(study_data, **change)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("missing", ["name", "objectives", "space", "data", "training", "budget"])
def test_what_is_required_is_said(study_data, missing):
    del study_data[missing]
    with pytest.raises(WorkbenchError, match=missing):
        StudyConfig.from_dict(study_data)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"name = ", "not TOML"),
        (b"\xff\xfe", "cannot read"),
        (b"", "required"),
        (None, "cannot read"),
    ],
)
def test_unreadable_files_are_one_message(tmp_path, content, words):
    path = tmp_path / "study.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WorkbenchError, match=words) as caught:
        StudyConfig.read(path)
    assert str(path) in str(caught.value)


def test_bounds_measure_how_far_outside():
    assert Bounds(max=10).violation(12) == 2
    assert Bounds(min=10).violation(12) <= 0
    assert Bounds(min=1, max=2).violation(0.5) == 0.5
    assert Bounds(max=1).violation(float("nan")) == float("inf")
