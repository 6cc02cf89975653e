"""The synthetic stage: between measured and trained, known at every rung, and without traces."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.workbench.conftest import make_config
from tests.workbench.plugin_files import write_plugin
from tests.workbench.studies import assert_all_accounted_for
from workbench.audit import audit
from workbench.funnel import study_funnel
from workbench.metric import STAGES
from workbench.records import Study, Trial
from workbench.reporter import Reporter
from workbench.study import run_study

PLUGIN = """
import random
import numpy
import torch
from workbench import DataSource, WorkbenchError
from workbench.data import Batch
from workbench.synthetic import learn
from workbench.testing.toy_layers import ToyMixer
from workbench.training_config import TrainingConfig

class Noisy(ToyMixer):
    # Draws from every generator there is, whenever it is trained.
    glyph = "y"
    def forward(self, x_BTD, context=None, state=None):
        noise = random.random() + numpy.random.random() + torch.rand(()) if self.training else 1.5
        return super().forward(x_BTD, context, state) * (0.9 + 0.05 * noise)

class Diverging(ToyMixer):
    glyph = "d"
    def forward(self, x_BTD, context=None, state=None):
        y_BTD = super().forward(x_BTD, context, state)
        return y_BTD * (float("nan") if self.training else 1.0)

class Overflowing(ToyMixer):
    # Sound until it was trained: the last update leaves what no loss of training tells.
    glyph = "v"
    steps = 0
    def forward(self, x_BTD, context=None, state=None):
        y_BTD = super().forward(x_BTD, context, state)
        type(self).steps += self.training
        return y_BTD * (float("inf") if self.steps == 4 and not self.training else 1.0)

class Threes(DataSource):
    # Every token is 3, of 5.
    vocab_size = 5
    def train_batch(self, step, batch_size, length):
        tokens_BT = torch.full((batch_size, length), 3)
        return Batch(inputs_BT=tokens_BT, targets_BT=tokens_BT)
    def validation_batches(self, batch_size, length):
        yield self.train_batch(0, batch_size, length)
    def describe(self):
        return {}

class Practice(Metric):
    unit, label, stage, direction = "share", "threes", "synthetic", "maximize"
    def measure(self, subject):
        assert subject.model is None
        config = TrainingConfig(tokens=32, batch_size=2, seq_len=4)
        found = learn(subject, Threes(None, seed=subject.seed, cache_dir=None), config)
        subject.extras["loss"] = found.loss
        return found.accuracy

class Width(Metric):
    unit, label, stage = "channels", "d_model", "synthetic"
    seen = []
    def measure(self, subject):
        self.seen.append(subject.layout.hash)
        return subject.layout.d_model

@hookimpl
def register_layers(register):
    register("noisy", Noisy)
    register("diverging", Diverging)
    register("overflowing", Overflowing)

@hookimpl
def register_metrics(register):
    register("practice", Practice)
    register("width", Width)
"""


class Listener(Reporter):
    def __init__(self) -> None:
        self.phases: list[tuple[int, str]] = []

    def trial_phase(self, number: int, phase: str) -> None:
        self.phases.append((number, phase))

    def of(self, number: int) -> list[str]:
        return [phase for other, phase in self.phases if other == number]


@pytest.fixture
def data(study_data: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    write_plugin(tmp_path / "plugins", "practising", PLUGIN)
    study_data["plugin_dirs"].append(str(tmp_path / "plugins"))
    study_data["report"] = []
    return study_data


def only(layer: str) -> dict[str, Any]:
    return {
        "space.mixers": [layer], "space.layers": {}, "space.d_model": 8, "space.num_layers": 1,
        "budget.trials": 1,
    }  # fmt: skip


def run(
    data: dict[str, Any], folder: Path, listener: Reporter | None = None, /, **changes: Any
) -> Study:
    study = run_study(make_config(data, **changes), folder, listener or Reporter())
    assert_all_accounted_for(study)
    return study


def first(study: Study, outcome: str = "complete") -> Trial:
    return next(trial for trial in study.trials() if trial.outcome == outcome)


def test_it_comes_after_measuring_and_before_training(data, runs):
    listener = Listener()
    study = run(data, runs, listener, report=["toy_depth", "practice"], **{"budget.trials": 1})
    trial = first(study)
    spent = list(trial.data["stage_seconds"])
    assert spent == ["static", "measured", "synthetic", "training", "trained", "quantized"]
    assert [stage for stage in spent if stage != "training"] == list(STAGES)
    assert listener.of(trial.number) == [
        "building", "measuring", "practising", "building", "training", "evaluating",
    ]  # fmt: skip
    assert trial.metrics["practice"] == 1.0  # the same token for ever is soon learned
    assert trial.data["extras"]["practice.loss"] > 0
    assert study.data["stages"]["practice"] == "synthetic"


@pytest.mark.parametrize("rungs", [{}, {"at": [0.5], "min_peers": 99}])
def test_it_leaves_no_trace_in_the_training(data, tmp_path, rungs):
    """Losses, figures and weights to the bit, of a layer that draws from every generator."""
    without, beside = (
        first(run(data, tmp_path / name, report=report, rungs=rungs, **only("noisy")))
        for name, report in (("without", []), ("beside", ["practice"]))
    )
    assert "practice" in beside.metrics
    assert without.metrics.items() <= beside.metrics.items()
    assert list(without.curve()["loss"]) == list(beside.curve()["loss"])
    mine, theirs = load_file(without.weights), load_file(beside.weights)
    assert all(bool((mine[name] == theirs[name]).all()) for name in mine | theirs)


def test_it_repeats_itself_whatever_was_drawn_before(data, tmp_path):
    one, other = (
        first(run(data, tmp_path / name, report=report, **only("noisy")))
        for name, report in (("one", ["practice"]), ("other", ["toy_depth", "practice"]))
    )
    assert one.data["extras"]["practice.loss"] == other.data["extras"]["practice.loss"]
    reseeded = first(run(data, tmp_path / "seed", report=["practice"], seed=1, **only("noisy")))
    assert one.data["extras"]["practice.loss"] != reseeded.data["extras"]["practice.loss"]


def test_a_constraint_on_it_refuses_before_the_training_and_once(data, runs):
    listener = Listener()
    changes = {"constraints": {"width": {"min": 10}}, "space.num_layers": 1, "budget.trials": 6}
    study = run(data, runs, listener, report=["width"], **changes)
    refused = [trial for trial in study.trials() if trial.outcome == "infeasible"]
    assert refused
    for trial in refused:
        assert trial.reason == "width = 8 is below min 10.0"
        assert trial.data["constraints"] == {"width": 2.0}
        assert set(trial.data["stage_seconds"]) == {"static", "synthetic"}
        assert "training" not in listener.of(trial.number)
        assert not list(trial.path.glob("*.safetensors"))
    assert study.summary()["outcomes"]["complete"] == 6  # what is refused costs no budget
    hashes = [trial.data["layout_hash"] for trial in refused]
    assert len(set(hashes)) == len(hashes), "a layout was judged twice"
    stages = {stage.name: stage for stage in study_funnel(study)}
    assert list(stages) == ["static", "synthetic", "trained", "quantized"]
    assert stages["synthetic"].left == {"infeasible": len(refused)}
    assert stages["synthetic"].seconds > 0
    for one, following in itertools.pairwise(stages.values()):
        assert one.passed == following.entered


@pytest.mark.slow
def test_it_is_under_the_trials_time_limit(data, runs):
    """A layer that hangs in training hangs there first."""
    changes = {**only("hangs"), "runtime.executor": "process", "budget.trial_timeout": 3}
    study = run(data, runs, report=["practice"], **changes)
    (trial,) = study.trials()
    assert (trial.outcome, trial.data["stage"]) == ("timeout", "synthetic")
    stages = {stage.name: stage for stage in study_funnel(study)}
    assert stages["synthetic"].left == {"timeout": 1}
    assert stages["trained"].entered == 0


def test_an_interrupt_in_it_puts_the_trial_back(data, runs):
    class Impatient(Listener):
        def trial_phase(self, number: int, phase: str) -> None:
            super().trial_phase(number, phase)
            if phase == "practising":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(data, runs, Impatient(), report=["practice"], **only("toy"))
    study = run(data, runs, report=["practice"], **only("toy"))
    left, again = study.trials()
    assert (left.outcome, left.data["stage"]) == ("interrupted", "synthetic")
    assert (again.outcome, again.data["retry_of"]) == ("complete", left.number)
    assert again.metrics["practice"] == 1.0


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ("diverging", "Threes: loss is nan at step 1; blocks[0] (diverging) returns NaN"),
        ("overflowing", "Threes: validation loss is nan"),
    ],
)
def test_a_training_of_its_own_that_diverges_is_the_trials_outcome(data, runs, layer, words):
    """Of two layers: one that cannot be trained, and one that breaks only in being judged."""
    study = run(data, runs, report=["practice"], **only(layer))
    (trial,) = study.trials()
    assert trial.outcome == "diverged"
    assert trial.reason.startswith(words)
    assert set(trial.data["stage_seconds"]) == {"static", "synthetic"}
    assert "practice" not in trial.metrics


def test_it_is_known_at_rungs_and_counts_there(data, runs):
    """Narrow trials are better in a synthetic objective: no wide one may stop them for its loss."""
    changes = {
        "objectives": ["toy_loss", "width"], "rungs": {"at": [0.5]}, "budget.trials": 12,
        "space.num_layers": [1, 2],
    }  # fmt: skip
    study = run(data, runs, **changes)
    stopped = [trial for trial in study.trials() if trial.outcome == "stopped"]
    assert stopped
    for trial in stopped:
        rung = trial.data["rungs"][-1]
        assert set(rung["metrics"]) == {"toy_loss"}
        peer = study.trial(rung["dominated_by"])
        assert peer.metrics["width"] <= trial.metrics["width"]
        assert peer.data["rungs"][0]["metrics"]["toy_loss"] <= rung["metrics"]["toy_loss"]


def test_the_audit_has_it_among_the_cheap_signals(data, runs):
    changes = {"rungs": {"at": [0.5], "min_peers": 99}}
    changes["report"] = ["toy_depth", "practice", "width"]
    found = audit(run(data, runs, **changes))
    kinds = {a.signal: a.kind for a in found.agreements}
    assert list(kinds.items()) == [
        ("toy_weights", "static"),
        ("toy_depth", "measured"),
        ("practice", "synthetic"),
        ("width", "synthetic"),
        ("toy_loss at 0.5", "rung"),
    ]
    width = next(a for a in found.agreements if a.signal == "width")
    assert (width.objective, width.trials) == ("toy_loss", 4)
    assert width.tau is not None
