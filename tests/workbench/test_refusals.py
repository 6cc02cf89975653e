"""Suggestions that come to nothing: what refused them, and studies in which all are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.workbench.conftest import make_config
from workbench import WorkbenchError
from workbench.records import Trial, load_study
from workbench.refusals import Refusals, _place, cause_of
from workbench.space import SpaceConfig
from workbench.study import run_study

IMPOSSIBLE = {"constraints": {"toy_weights": {"max": 10}}}


def refused(reason: str, **constraints: float) -> Trial:
    trial = Trial.damaged("toys", Path("00000"), reason)
    trial.data.update(outcome="infeasible", constraints=constraints)
    return trial


@pytest.mark.parametrize(
    ("trial", "cause"),
    [
        (refused("blocks[3] (attention).head_dim: 48 does", buildable=1.0), "attention.head_dim"),
        (refused("periodic.offset: 4: is beyond", buildable=1.0), "periodic.offset"),
        (
            refused("blocks[0] (mamba).quantizer.group_size: 7", buildable=1.0),
            "mamba.quantizer.group_size",
        ),
        (refused("parameters = 9 is above max 8", parameters=1.0), "constraints.parameters"),
        (
            refused("a = 9 is above max 8; b = 1 is below min 2", a=1.0, b=1.0, c=-3.0),
            "constraints.a, constraints.b",
        ),
    ],
)
def test_a_cause_is_the_field_or_the_constraint(trial: Trial, cause: str) -> None:
    assert cause_of(trial) == cause


def test_lines_say_how_often_where_and_the_nearest_miss(study_data: dict[str, Any]) -> None:
    refusals = Refusals()
    for over in (500.0, 20.0, 300.0):
        refusals.add(refused(f"toy_weights = {10 + over:g} is above max 10", toy_weights=over))
    refusals.add(refused("blocks[1] (toy).width: 3 is odd", buildable=1.0))
    refusals.add(refused("alternate: placed nothing", buildable=1.0))
    assert refusals.lines(make_config(study_data).space) == [
        "    3 × [constraints] toy_weights, such as: toy_weights = 30 is above max 10",
        "    1 × [space.layers.toy] width, such as: blocks[1] (toy).width: 3 is odd",
        "    1 × [space.placement.alternate], such as: alternate: placed nothing",
    ]


def run(study_data: dict[str, Any], runs: Path, **changes: Any) -> str:
    """The message with which a study stops."""
    with pytest.raises(WorkbenchError) as caught:
        run_study(make_config(study_data, **changes), runs)
    return str(caught.value)


def test_where_a_layer_lies_is_no_field_of_it() -> None:
    space = SpaceConfig(d_model=8, num_layers=1, mixers=("reader",), mlps=("gate",), placements=())
    assert _place("reader.layer", space) == "[space] mixers and placements (reader)"
    assert _place("gate.layer", space) == "[space] mlps (gate)"


def test_a_study_in_which_nothing_is_feasible_stops_early_and_says_why(
    study_data: dict[str, Any], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workbench.scheduler.HOPELESS", 12)
    message = run(study_data, runs, **IMPOSSIBLE)
    assert message.startswith("none of 12 suggestions is feasible.")
    nearest = min(trial.metrics["toy_weights"] for trial in load_study("toys", runs).trials())
    assert f"\n   12 × [constraints] toy_weights, such as: toy_weights = {nearest:,.8g}" in message
    assert "workbench show toys --all" in message
    # Another run tries again, and what the first one tried stays.
    run(study_data, runs, **IMPOSSIBLE)
    trials = load_study("toys", runs).trials()
    assert [trial.number for trial in trials] == list(range(24))
    assert {trial.outcome for trial in trials} == {"infeasible"}
    assert all(trial.reason and trial.params for trial in trials)


def test_one_feasible_layout_is_reason_to_search_on(
    study_data: dict[str, Any], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workbench.scheduler.HOPELESS", 5)
    only = {"space.d_model": 8, "space.num_layers": 1, "space.layers": {}}
    message = run(study_data, runs, **only)
    found = re.match(r"the last (\d+) suggestions held no new feasible layout", message)
    assert found is not None
    assert int(found[1]) == 30  # not 5
