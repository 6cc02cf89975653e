"""Records read from disk: what is damaged is named and hides nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from workbench import WorkbenchError, load_study
from workbench.records import Study, Trial, list_studies, read_studies

OBJECTIVES = [
    {"name": "loss", "unit": "nats", "direction": "minimize"},
    {"name": "speed", "unit": "tokens/s", "direction": "maximize"},
]


def write_study(runs: Path, name: str, /, **changes: Any) -> Path:
    folder = runs / name
    folder.mkdir(parents=True)
    data = {"name": name, "objectives": OBJECTIVES, "units": {"loss": "nats"}, **changes}
    (folder / "study.json").write_text(json.dumps(data))
    return folder


def write_trial(study: Path, number: int, loss: float, speed: float, **changes: Any) -> Path:
    path = study / "trials" / f"{number:05d}" / "trial.json"
    path.parent.mkdir(parents=True)
    metrics = {"loss": loss, "speed": speed}
    path.write_text(json.dumps({"outcome": "complete", "metrics": metrics, **changes}))
    return path


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Three complete trials: 0 and 2 on the front, 1 dominated by both."""
    folder = write_study(tmp_path, "small")
    for number, figures in enumerate([(1.0, 10.0), (3.0, 5.0), (2.0, 20.0)]):
        write_trial(folder, number, *figures)
    return load_study("small", tmp_path)


def test_a_front_minds_each_direction(study: Study) -> None:
    assert [trial.number for trial in study.front_trials()] == [0, 2]
    assert list(study.front().index) == [0, 2]


def test_a_frame_keeps_whole_numbers_whole_and_objectives_first(study: Study) -> None:
    write_trial(study.path, 3, 1.0, 1.0, metrics={"depth": 4.0, "speed": 3.0, "loss": 2.0})
    records = {0: {"d_model": 64, "rate": 1.0, "mixer": "mamba"}, 1: {"d_model": 96, "heads": 2}}
    for number, params in records.items():
        path = study.path / "trials" / f"{number:05d}" / "trial.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "params": params}))
    refused = {"outcome": "infeasible", "metrics": {}, "params": {"d_model": 8}}
    write_trial(study.path, 4, 0.0, 0.0, **refused)
    frame = study.frame()
    assert list(frame.reset_index().columns) == [
        "number", "outcome", "loss", "speed", "depth",
        "param.d_model", "param.rate", "param.mixer", "param.heads",
        "pattern", "reason", "seconds", "layout",
    ]  # fmt: skip
    assert str(frame["param.d_model"].dtype) == str(frame["param.heads"].dtype) == "Int64"
    assert str(frame["param.rate"].dtype) == str(frame["loss"].dtype) == "float64"
    assert frame["param.d_model"].dropna().to_dict() == {0: 64, 1: 96, 4: 8}
    assert frame["loss"].isna().tolist() == [False] * 4 + [True]
    assert list(study.front().columns)[:3] == ["outcome", "loss", "speed"]


def test_a_frame_without_trials_has_its_columns(tmp_path: Path) -> None:
    write_study(tmp_path, "empty")
    frame = load_study("empty", tmp_path).frame()
    assert frame.empty
    assert list(frame.columns)[:3] == ["outcome", "loss", "speed"]


def test_a_damaged_record_is_a_row_that_says_so(study: Study) -> None:
    path = study.path / "trials" / "00000" / "trial.json"
    path.write_text('{"outcome": "comp')
    frame = study.frame()
    assert list(frame["outcome"]) == ["damaged", "complete", "complete"]
    assert str(path) in frame["reason"][0]
    assert [trial.number for trial in study.front_trials()] == [2]
    assert study.summary()["outcomes"] == {"damaged": 1, "complete": 2}
    with pytest.raises(WorkbenchError, match=r"00000/trial\.json is not JSON"):
        study.trial(0)


def test_a_complete_trial_without_its_objectives_is_damaged(study: Study) -> None:
    path = write_trial(study.path, 3, 0.0, 0.0, metrics={"loss": 0.0})
    (trial,) = [trial for trial in study.trials() if trial.outcome == "damaged"]
    assert trial.number == 3
    assert trial.reason == f"{path} is damaged: it lacks 'speed'"
    assert [front.number for front in study.front_trials()] == [0, 2]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[]", "expected an object, got list"),
        ("{}", "it lacks 'outcome'"),
        ('{"outcome": 3}', "'outcome' is no str"),
        ('{"outcome": "splendid"}', "no outcome is called 'splendid'"),
        ('{"outcome": "complete", "params": []}', "'params' is no dict"),
        ('{"outcome": "complete", "rungs": null}', "'rungs' is no list"),
    ],
)
def test_what_is_no_trials_record(study: Study, text: str, what: str) -> None:
    path = study.path / "trials" / "00001"
    (path / "trial.json").write_text(text)
    with pytest.raises(WorkbenchError) as error:
        Trial("small", path)
    assert str(error.value) == f"{path / 'trial.json'} is damaged: {what}"


@pytest.mark.parametrize(
    "changes",
    [{"name": 3}, {"objectives": "loss"}, {"objectives": [{"name": "loss"}]}, {"units": []}],
    ids=str,
)
def test_a_damaged_study_hides_no_other(
    study: Study, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = write_study(tmp_path, "other", **changes)
    studies, damaged = read_studies(tmp_path)
    assert [found.name for found in studies] == ["small"]
    assert [found.name for found in list_studies(tmp_path)] == ["small"]
    (message,) = damaged
    assert message.startswith(f"{folder / 'study.json'} is damaged: ")
    with pytest.raises(WorkbenchError, match="Did you mean 'small'"):
        load_study("smal", tmp_path)
