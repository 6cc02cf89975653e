"""The funnel: every trial enters, leaves once, and every second is in one stage."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest

from tests.workbench.studies import run
from workbench.funnel import FunnelStage, funnel, study_funnel
from workbench.records import Trial

SHARES = (0.1, 0.3)


def record(tmp_path, number: int, outcome: str, **facts) -> Trial:
    folder = tmp_path / "trials" / f"{number:05d}"
    folder.mkdir(parents=True)
    (folder / "trial.json").write_text(json.dumps({"outcome": outcome, **facts}))
    return Trial("made", folder)


def rung(seconds: float) -> dict:
    return {"seconds": seconds, "metrics": {}}


def table(stages: list[FunnelStage]) -> dict[str, tuple]:
    return {s.name: (s.entered, s.passed, s.left, round(s.seconds, 6)) for s in stages}


def test_each_way_out_is_counted_where_it_is(tmp_path):
    whole = {"static": 1, "measured": 2, "training": 30, "rungs": 3, "trained": 4, "quantized": 5}
    trials = [
        record(tmp_path, 0, "complete", stage_seconds=whole, rungs=[rung(6), rung(9)]),
        record(tmp_path, 1, "duplicate"),
        record(tmp_path, 2, "infeasible", stage_seconds={"static": 1}),
        record(tmp_path, 3, "error", stage_seconds={"static": 1, "measured": 2}),
        record(
            tmp_path, 4, "stopped", rungs=[rung(6)],
            stage_seconds={"static": 1, "measured": 2, "training": 5, "rungs": 1},
        ),
        record(
            tmp_path, 5, "diverged", rungs=[rung(6)],
            stage_seconds={"static": 1, "measured": 2, "training": 7, "rungs": 1},
        ),
        record(tmp_path, 6, "timeout", stage="measured", stage_seconds={"static": 1}, seconds=11),
        record(tmp_path, 7, "running", stage="training"),
    ]  # fmt: skip
    found = funnel(trials, {"static", "measured", "quantized"}, SHARES)
    assert table(found) == {
        "static": (8, 6, {"duplicate": 1, "infeasible": 1}, 6),
        "measured": (6, 4, {"error": 1, "timeout": 1}, 18),
        "rung 0.1": (4, 2, {"stopped": 1, "running": 1}, 18),
        "rung 0.3": (2, 1, {"diverged": 1}, 11),
        "trained": (1, 1, {}, 22),
        "quantized": (1, 1, {}, 5),
    }


def test_what_runs_again_enters_where_it_goes_on(tmp_path):
    """A trial that crashed after its first rung, and the one that repeats it from there."""
    before = {"static": 1, "measured": 2, "training": 5, "rungs": 1}
    after = {"static": 1, "training": 20, "rungs": 2, "trained": 1, "quantized": 1}
    trials = [
        record(
            tmp_path, 0, "crashed", stage="training", rungs=[rung(6)], stage_seconds=before,
            seconds=12,
        ),
        record(
            tmp_path, 1, "complete", rungs=[rung(6), rung(7)], carried_rungs=1, stage_seconds=after
        ),
    ]  # fmt: skip
    found = table(funnel(trials, {"static", "measured"}, SHARES))
    assert found == {
        "static": (2, 2, {}, 2),
        "measured": (1, 1, {}, 2),
        "rung 0.1": (1, 1, {}, 6),
        "rung 0.3": (2, 1, {"crashed": 1}, 10),
        "trained": (1, 1, {}, 16),
        "quantized": (1, 1, {}, 1),
    }


def test_a_synthetic_stage_is_entered_after_measuring_and_once(tmp_path):
    """One that it refused, one killed in it, and one that crashed after a rung and ran again."""
    spent = {"static": 1, "measured": 2, "synthetic": 3}
    trials = [
        record(tmp_path, 0, "infeasible", stage_seconds=spent),
        record(
            tmp_path, 1, "timeout", stage="synthetic", stage_seconds={"static": 1, "measured": 2},
            seconds=12,
        ),
        record(
            tmp_path, 2, "crashed", stage="training", rungs=[rung(6)], seconds=16,
            stage_seconds={**spent, "training": 5, "rungs": 1},
        ),
        record(
            tmp_path, 3, "complete", rungs=[rung(6), rung(7)], carried_rungs=1,
            stage_seconds={"static": 1, "training": 7, "trained": 1, "quantized": 1},
        ),
    ]  # fmt: skip
    found = table(funnel(trials, {"static", "measured", "synthetic"}, SHARES))
    assert list(found)[:3] == ["static", "measured", "synthetic"]
    assert found["measured"] == (3, 3, {}, 6)
    assert found["synthetic"] == (3, 1, {"infeasible": 1, "timeout": 1}, 3 + 9 + 3)
    assert found["rung 0.1"][:3] == (1, 1, {})
    assert found["rung 0.3"][:3] == (2, 1, {"crashed": 1})
    assert "synthetic" not in table(funnel(trials, {"static"}, SHARES))


@pytest.mark.parametrize("rungs", [{}, {"at": [0.25, 0.5]}])
def test_a_studys_funnel_adds_up(study_data, runs, rungs):
    changes = {"constraints": {"toy_weights": {"max": 1500}}, "budget.trials": 8, "rungs": rungs}
    study = run(study_data, runs, **changes)
    stages = study_funnel(study)
    names = ["static", "measured", *(f"rung {x}" for x in rungs.get("at", [])), "trained"]
    assert [stage.name for stage in stages] == [*names, "quantized"]
    outcomes = study.summary()["outcomes"]
    assert stages[0].entered == sum(outcomes.values())
    for one, following in itertools.pairwise(stages):
        assert one.passed == following.entered
    assert stages[-1].passed == outcomes["complete"]
    left: dict[str, int] = {}
    for stage in stages:
        for outcome, count in stage.left.items():
            left[outcome] = left.get(outcome, 0) + count
    assert left == {name: count for name, count in outcomes.items() if name != "complete"}
    if rungs:
        assert left["stopped"]
    spent = sum(sum(t.data["stage_seconds"].values()) for t in study.trials())
    assert sum(stage.seconds for stage in stages) == pytest.approx(spent)
    assert {"passed", *(field.name for field in dataclasses.fields(FunnelStage))} == set(
        stages[0].to_dict()
    )
