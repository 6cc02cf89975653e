"""What a FieldError stands for: before a trial's stages a refusal, in them a plugin's fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.workbench.conftest import make_config
from tests.workbench.plugin_files import write_plugin
from workbench.ledger import UNBUILDABLE
from workbench.records import Study, Trial
from workbench.study import run_study

RAISE = "raise FieldError('width', 'does not fit')"
PLUGIN = """
import torch
from torch import nn
from typing import Annotated
from workbench import (
    Batch, Choice, DataSource, FieldError, QuantizationReport, Quantizer, WorkbenchError,
)

class Bad(Idle):
    glyph, kind = "!", "recurrent"
    def __init__(self, d_model, config, **factory):
        super().__init__(d_model, config)
        self.proj = nn.Linear(d_model, d_model, bias=False, **factory)
        {constructor}
    @classmethod
    def check(cls, d_model, config):
        {check}
    @classmethod
    def costs(cls, d_model, config, *, length, bytes_per_element=4):
        {costs}
        return Costs(parameters=d_model**2)
    def forward(self, x_BTD, context=None, state=None):
        {forward}
        return self.proj(x_BTD)

class Grouped(Quantizer):
    @dataclass(frozen=True, kw_only=True)
    class Config:
        group_size: Annotated[int, Choice(1, 3)] = 1
    @classmethod
    def quantize(cls, layer, config):
        {quantize}
        return QuantizationReport(quantized={{}}, kept={{"proj": "the test looks elsewhere"}})

class Odd(Metric):
    stage = "{stage}"
    def measure(self, subject):
        {measure}
        return 1.0

class Numbers(DataSource):
    vocab_size = 8
    drawn = 0
    def train_batch(self, step, batch_size, length):
        {train_batch}
        tokens = torch.zeros(batch_size, length, dtype=torch.long)
        return Batch(inputs_BT=tokens, targets_BT=tokens, num_bytes=tokens.numel())
    def validation_batches(self, batch_size, length):
        {validation_batches}
        yield self.train_batch(0, batch_size, length)
    def describe(self):
        return {{"vocab_size": 8}}

@hookimpl
def register_layers(register):
    register("bad", Bad)

@hookimpl
def register_quantizers(register):
    register("grouped", Grouped)

@hookimpl
def register_metrics(register):
    register("odd", Odd)

@hookimpl
def register_data_sources(register):
    register("numbers", Numbers)
"""
PLACES = (
    "constructor", "check", "costs", "forward", "quantize", "measure", "train_batch",
    "validation_batches",
)  # fmt: skip


def run(study_data: Any, folder: Path, lines: dict[str, str], **changes: Any) -> Study:
    """A study of layers called `bad` and good ones, some places of the plugin doing `lines`."""
    code = {"stage": "measured", **dict.fromkeys(PLACES, "pass"), **lines}
    write_plugin(folder / "faulty", "faulty", PLUGIN.format(**code))
    study_data["plugin_dirs"].append(str(folder / "faulty"))
    study_data["space"].update(mixers=["bad"], layers={}, num_layers=1)
    study_data["report"] = ["odd"]
    return run_study(make_config(study_data, **changes), folder / "runs")


def first(study: Study, outcome: str) -> Trial:
    found = [trial for trial in study.trials() if trial.outcome == outcome]
    assert found, [(trial.outcome, trial.reason) for trial in study.trials()]
    return found[0]


def log(trial: Trial) -> str:
    path = trial.path / "log.txt"
    return path.read_text() if path.exists() else ""


ON_A_DEVICE = "if {tensor}.device.type != 'meta': " + RAISE
FAULTS = {
    "a layer that is built": {"constructor": ON_A_DEVICE.format(tensor="self.proj.weight")},
    "a layer that is looked at": {"forward": RAISE},
    "a layer in training": {"forward": f"if self.training: {RAISE}"},
    "a metric measured": {"measure": RAISE},
    "a metric once trained": {"measure": RAISE, "stage": "trained"},
    "a metric once quantized": {"measure": RAISE, "stage": "quantized"},
    "data in training": {"train_batch": f"if step: {RAISE}"},
    "data in evaluation": {
        "validation_batches": f"type(self).drawn += 1\n        if self.drawn > 1: {RAISE}"
    },
    "no field, but a mistake": {"forward": "raise WorkbenchError('width: does not fit')"},
}


@pytest.mark.parametrize("lines", FAULTS.values(), ids=FAULTS)
def test_in_its_stages_a_field_error_is_a_fault(study_data, tmp_path, lines) -> None:
    data = {"source": "numbers"}
    study = run(study_data, tmp_path, lines, data=data, **{"budget.trials": 1})
    (trial,) = study.trials()
    assert (trial.outcome, trial.reason) == ("error", "width: does not fit")
    assert trial.data["constraints"] == {}
    assert "Traceback" in log(trial)
    assert "faulty.py" in log(trial)
    assert "does not fit" in log(trial)


@pytest.mark.parametrize("place", ["check", "costs"])
def test_before_them_it_is_a_refusal(study_data, tmp_path, place) -> None:
    lines = {place: "if d_model == 8: raise FieldError('width', f'does not fit {d_model}')"}
    study = run(study_data, tmp_path, lines, **{"budget.trials": 2})
    assert {trial.outcome for trial in study.trials()} <= {"infeasible", "complete", "duplicate"}
    refused = first(study, "infeasible")
    assert refused.params["d_model"] == 8
    assert refused.reason.endswith("width: does not fit 8")
    assert refused.data["constraints"] == {UNBUILDABLE: 1.0}
    assert log(refused) == ""
    assert "measured" not in refused.data.get("stage_seconds", {})


REFUSE = "if 8 % config.group_size: raise FieldError('group_size', f'{config.group_size} is odd')"


@pytest.mark.parametrize(
    ("lines", "stages"),
    [
        ({"quantize": REFUSE}, {"static"}),
        ({"quantize": f"if layer.proj.weight.device.type == 'cpu' and {REFUSE[3:]}"},
         {"static", "measured"}),
        ({"quantize": f"if layer.proj.weight.device.type == 'cpu' and {REFUSE[3:]}",
          "stage": "trained"}, {"static", "training", "trained", "quantized"}),
    ],
    ids=["counted", "measured", "trained"],
)  # fmt: skip
def test_a_quantizer_may_refuse_at_any_time(study_data, tmp_path, lines, stages) -> None:
    changes = {"space.quantizers": ["grouped"], "budget.trials": 3}
    changes["space.quantizer"] = {"grouped": {"group_size": [1, 3]}}
    study = run(study_data, tmp_path, lines, **changes)
    refused = first(study, "infeasible")
    assert refused.reason.endswith("group_size: 3 is odd")
    assert refused.data["constraints"] == {UNBUILDABLE: 1.0}
    assert set(refused.data["stage_seconds"]) == stages
    assert log(refused) == ""
    assert first(study, "complete").layout.blocks[0].quantizer.config == {"group_size": 1}


def test_a_violated_constraint_is_a_refusal_in_any_stage(study_data, tmp_path) -> None:
    changes = {"constraints": {"odd": {"max": 0.5}}, "budget.trials": 1}
    study = run(study_data, tmp_path, {"stage": "trained"}, **changes)
    refused = first(study, "infeasible")
    assert refused.data["constraints"] == {"odd": 0.5}
    assert "training" in refused.data["stage_seconds"]
