"""The audit: agreement of cheap signals with full trainings, by its properties and by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.workbench.studies import run
from workbench import WorkbenchError
from workbench.audit import Agreement, Audit, audit, bootstrap
from workbench.rank_correlation import kendall_tau
from workbench.records import Study

OBJECTIVES = [
    {"name": "loss", "unit": "nats", "direction": "minimize"},
    {"name": "score", "unit": "share", "direction": "maximize"},
    {"name": "weights", "unit": "parameters", "direction": "minimize"},
]
STAGES = {
    "loss": "trained", "score": "quantized", "weights": "static", "speed": "measured",
    "recall": "trained",
}  # fmt: skip
values = st.lists(st.integers(0, 5).map(float), min_size=3, max_size=9)


def write(folder: Path, trials: list[dict[str, Any]], **changes: Any) -> Study:
    folder.mkdir(parents=True, exist_ok=True)
    data = {"name": "s", "objectives": OBJECTIVES, "units": {}, "stages": STAGES, **changes}
    (folder / "study.json").write_text(json.dumps(data))
    for number, trial in enumerate(trials):
        path = folder / "trials" / f"{number:05d}" / "trial.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"outcome": "complete", **trial}))
    return Study(folder)


def trial(loss: float, *, rung: float | None = None, **metrics: float) -> dict[str, Any]:
    """One that was trained to the end; what is not said of it follows from its loss."""
    rungs = [] if rung is None else [{"share": 0.25, "step": 5, "metrics": {"loss": rung}}]
    given = {"loss": loss, "score": -loss, "weights": 10.0 - loss, "speed": 1.0, **metrics}
    return {"metrics": given, "rungs": rungs}


def of(found: Audit, signal: str, objective: str = "loss") -> Agreement:
    return next(a for a in found.agreements if (a.signal, a.objective) == (signal, objective))


def test_every_signal_meets_every_objective_of_training(tmp_path):
    trials = [trial(n, rung=n / 2, recall=-n) for n in (1.0, 2.0, 3.0)]
    found = audit(write(tmp_path / "s", trials))
    names = [(a.signal, a.kind, a.objective) for a in found.agreements]
    assert names == [
        ("weights", "static", "loss"), ("weights", "static", "score"),
        ("speed", "measured", "loss"), ("speed", "measured", "score"),
        ("loss at 0.25", "rung", "loss"), ("loss at 0.25", "rung", "score"),
        ("loss", "trained", "score"),
        ("recall", "trained", "loss"), ("recall", "trained", "score"),
        ("score", "quantized", "loss"),
    ]  # fmt: skip
    assert of(found, "loss at 0.25").tau == 1.0
    assert of(found, "weights").tau == of(found, "recall").tau == -1.0
    assert of(found, "weights").follows == -1
    assert of(found, "weights").flipped == 0  # read as its correlation says: more, lower loss
    assert of(found, "speed").tau is None  # all equal: no order
    assert of(found, "speed").low is None


def test_flips_are_the_pairs_in_the_wrong_order_worst_first(tmp_path):
    """Rungs order 0 1 2 3, trainings 1 0 3 2 for the loss: two flips, losses 0.5 and 2."""
    trials = [trial(1.5, rung=1), trial(1, rung=2), trial(5, rung=3), trial(3, rung=4)]
    found = of(audit(write(tmp_path / "s", trials)), "loss at 0.25")
    assert [(flip.chosen, flip.better, flip.loss) for flip in found.flips] == [
        (2, 3, 2.0),
        (0, 1, 0.5),
    ]
    assert found.flips[0].signal == (3.0, 4.0)
    assert found.flips[0].objective == (5.0, 3.0)
    assert (found.trials, found.pairs, found.flipped) == (4, 6, 2)
    assert found.tau == pytest.approx(1 / 3)
    upwards = of(audit(write(tmp_path / "s", trials), flips=1), "loss at 0.25", "score")
    assert [(flip.chosen, flip.better) for flip in upwards.flips] == [(2, 3)]  # maximized
    assert upwards.flipped == 2


def test_an_objectives_own_rungs_are_never_read_backwards(tmp_path):
    trials = [trial(n, rung=-n) for n in (1.0, 2.0, 3.0)]
    found = of(audit(write(tmp_path / "s", trials)), "loss at 0.25")
    assert found.tau == -1.0
    assert found.follows == 1
    assert found.flipped == 3


@given(values, st.randoms())
def test_discordant_pairs_and_tau_agree(tmp_path_factory, losses, dice: random.Random):
    """Without ties on one side, tau-b's numerator is pairs less twice the flips."""
    assume(len(set(losses)) > 1)
    ranks = list(range(len(losses)))
    dice.shuffle(ranks)
    trials = [trial(loss, rung=rank) for loss, rank in zip(losses, ranks, strict=True)]
    folder = tmp_path_factory.mktemp("audit") / "s"
    found = of(audit(write(folder, trials), flips=99, resamples=1000), "loss at 0.25")
    ordered = sum(a != b for i, a in enumerate(losses) for b in losses[:i])
    assert found.tau is not None
    assert found.flipped == len(found.flips)
    expected = (ordered - 2 * found.flipped) / (ordered * found.pairs) ** 0.5
    assert found.tau == pytest.approx(expected)
    assert [flip.loss for flip in found.flips] == sorted(
        (flip.loss for flip in found.flips), reverse=True
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_bootstrap_is_that_of_tau_itself(seed):
    """The quadratic forms give what tau gives of the same resamples, one by one; with ties."""
    dice = random.Random(seed)
    first = [float(dice.randint(0, 5)) for _ in range(7)]
    second = [value + dice.choice((0, 1, 3)) for value in first]
    draws = np.random.default_rng(seed).multinomial(7, [1 / 7] * 7, 1000)
    taus = []
    for counts in draws:
        picks = [index for index, count in enumerate(counts) for _ in range(count)]
        taus.append(kendall_tau([first[i] for i in picks], [second[i] for i in picks]))
    expected = np.quantile([tau for tau in taus if tau is not None], [0.025, 0.975])
    assert bootstrap(first, second, 1000, seed) == pytest.approx(tuple(expected))
    assert expected[0] < kendall_tau(first, second) < expected[1] <= 1.0


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    """Of two normal figures with a correlation r, the true tau is 2 asin(r) / π."""
    truth, dice, held = 1 / 3, random.Random(2), 0  # r = 1/2
    for study in range(200):
        first = [dice.gauss(0, 1) for _ in range(30)]
        second = [0.5 * x + 0.75**0.5 * dice.gauss(0, 1) for x in first]
        low, high = bootstrap(first, second, 1000, study)
        assert low is not None
        assert high is not None
        held += low <= truth <= high
    assert 0.88 <= held / 200 <= 0.99


def test_two_trials_have_no_interval():
    assert bootstrap([1, 2], [1, 2], 1000, 0) == (None, None)


def test_what_rungs_stopped_is_said_to_be_missing(tmp_path):
    trials = [trial(float(n), rung=n) for n in range(10)]
    trials[0]["metrics"].update(weights=4.5, score=-3.5)  # no signal agrees in all pairs
    trials[0]["rungs"][0]["metrics"]["loss"] = 7.5
    clean = audit(write(tmp_path / "clean", trials))
    assert clean.warnings == []
    stopped = {"outcome": "stopped", "metrics": {"weights": 1.0}, "rungs": trials[0]["rungs"]}
    found = audit(write(tmp_path / "s", [*trials, stopped, {"outcome": "diverged"}]))
    assert found.missing == {"stopped": 1, "diverged": 1}
    assert "Selection bias: 1 trial that rungs stopped" in found.warnings[0]
    assert "1 diverged" in found.warnings[1]
    assert found.agreements == clean.agreements
    assert json.loads(json.dumps(found.to_dict()))["warnings"] == found.warnings
    few = audit(write(tmp_path / "few", trials[:9]))
    assert few.warnings == ["9 trials trained to the end: the intervals of so few are too narrow."]


def test_a_signal_of_few_of_the_trials_is_named(tmp_path):
    trials = [trial(float(n)) for n in range(12)]
    for n, one in enumerate(trials):
        one["metrics"].update(weights=float((n * 5) % 12), score=float((n * 7) % 12))
    for n in (0, 4, 2, 6):
        trials[n]["metrics"]["recall"] = float(n % 3)
    found = audit(write(tmp_path / "s", trials))
    assert of(found, "recall").trials == 4
    assert found.warnings == ["recall: known of 4 trials only; such intervals are too narrow."]


def test_an_order_that_all_agree_on_is_no_certainty(tmp_path):
    trials = [trial(float(n), score=float((n * 7) % 12)) for n in range(12)]
    found = audit(write(tmp_path / "s", trials))
    assert (of(found, "weights").low, of(found, "weights").high) == (-1.0, -1.0)
    assert len(found.warnings) == 1
    assert found.warnings[0].startswith("weights: an interval without width.")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trials": 1}, "has 1 trial trained to the end"),
        ({"objectives": OBJECTIVES[2:]}, "no objective of study 's' comes from training"),
        ({"stages": None}, "does not say which stage"),
    ],
)
def test_what_cannot_be_audited_is_refused(tmp_path, change, words):
    count = change.pop("trials", 3)
    study = write(tmp_path / "s", [trial(float(n)) for n in range(count)], **change)
    with pytest.raises(WorkbenchError, match=words):
        audit(study)


@pytest.mark.parametrize("arguments", [{"resamples": 999}, {"flips": -1}])
def test_mistakes_are_refused(tmp_path, arguments):
    study = write(tmp_path / "s", [trial(1.0), trial(2.0)])
    with pytest.raises(WorkbenchError, match=next(iter(arguments))):
        audit(study, **arguments)


def test_a_real_study_with_rungs(study_data, runs):
    changes = {"rungs": {"at": [0.5], "min_peers": 99}, "budget.trials": 4}
    found = audit(run(study_data, runs, **changes))
    rung = of(found, "toy_loss at 0.5", "toy_loss")
    assert rung.trials == 4
    assert rung.pairs == 6
    assert {a.signal for a in found.agreements} == {"toy_weights", "toy_depth", "toy_loss at 0.5"}
