"""Plugins that misbehave in a study: a recorded outcome, and no other trial is the worse for it."""

from __future__ import annotations

import copy
import dataclasses
import random
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tests.workbench.conftest import STUDY, make_config
from tests.workbench.plugin_files import write_plugin
from workbench import WorkbenchError
from workbench.study import run_study

LAYER = """
import os, random, sys
import torch
from torch import nn
from workbench import DataSource, Mixer, Placement

class Fault(Layer):
    glyph = "!"
    def __init__(self, d_model, config, **factory):
        super().__init__(d_model, config)
        self.proj = nn.Linear(d_model, d_model, bias=False, **factory)
        self.gate = nn.Parameter(torch.zeros((), **factory))
    def reset_parameters(self):
        nn.init.zeros_(self.gate)
    @classmethod
    def costs(cls, d_model, config, *, length, bytes_per_element=4):
        return Costs(parameters=d_model**2 + 1)
    def forward(self, x_BTD, context=None, state=None):
        return self.proj(x_BTD)

class Bad(Fault):
{body}

@hookimpl
def register_layers(register):
    register("bad", Bad)
"""
FORWARD = "    def forward(self, x_BTD, context=None, state=None):\n"


def forward(*lines: str) -> str:
    return FORWARD + "".join(f"        {line}\n" for line in lines)


def constructor(*lines: str) -> str:
    head = "    def __init__(self, d_model, config, **factory):\n"
    return head + "".join(
        f"        {line}\n" for line in ("super().__init__(d_model, config, **factory)", *lines)
    )


def costs(line: str) -> str:
    return (
        "    @classmethod\n"
        "    def costs(cls, d_model, config, *, length, bytes_per_element=4):\n"
        f"        {line}\n"
    )


PATCH = "torch.nn.functional.softmax = torch.nn.functional.log_softmax"
WHERE = "blocks[0] ({name})"
FAULTS = {
    "leaks": (
        forward("return self.proj(x_BTD.mean(1, keepdim=True).expand_as(x_BTD))"),
        "error", (WHERE + " leaks the future",),
    ),
    "one-token-ahead": (
        forward("return self.proj(torch.roll(x_BTD, -1, 1))"),
        "error", (WHERE + " leaks the future",),
    ),
    "leaks-where-it-had-learnt-to": (
        forward("return self.proj(x_BTD) + self.gate * x_BTD.flip(1)"),
        "error", (WHERE + " leaks the future",),
    ),
    "leaks-in-its-chunk": (
        forward("return self.proj(torch.cat([c.flip(1) for c in x_BTD.split(8, 1)], 1))"),
        "error", (WHERE + " leaks the future",),
    ),
    "wrong-shape": (
        forward("return self.proj(x_BTD)[..., :1]"),  # the residual stream would take it
        "error", (WHERE + " returns shape [2, 16, 1]", "inputs of shape [2, 16, "),
    ),
    "no-tensor": (
        forward("return self.proj(x_BTD), None"), "error", (WHERE + " returns tuple",),
    ),
    "nan": (
        forward("return self.proj(x_BTD) * float('nan')"), "error", (WHERE + " returns NaN",),
    ),
    "infinity": (forward("return self.proj(x_BTD) / 0"), "error", (WHERE + " returns",)),
    "nan-in-training": (
        forward("return self.proj(x_BTD) * (float('nan') if self.training else 1)"),
        "diverged", ("loss is nan at step 1", WHERE + " returns NaN"),
    ),
    "allocates-on-meta": (
        "    def __init__(self, d_model, config, **factory):\n"
        "        super().__init__(d_model, config)\n",
        "error", (WHERE + " allocates 'gate' on cpu", "hand `device`"),
    ),
    "exits": (forward("sys.exit(3)"), "error", ("SystemExit: 3",)),
    "base-exception": (forward("raise BaseException('odd')"), "error", ("BaseException: odd",)),
    "exits-in-costs": (costs("sys.exit(3)"), "error", ("SystemExit: 3",)),
    "costs-are-no-costs": (costs("return 3"), "error", ("Error",)),
    "patches-in-forward": (
        forward(PATCH, "return self.proj(x_BTD)"),
        "error", ("layer '{name}' (plugin 'bad') changed", "torch.nn.functional.softmax became"),
    ),
    "patches-in-its-constructor": (
        constructor("def mine(*args, **more): return args[0]", "torch.softmax = mine"),
        "error", ("plugin 'bad' changed", "torch.softmax became Bad_"),
    ),
    "patches-a-method": (
        constructor("nn.Linear.forward = lambda self, x: x"),
        "error", ("plugin 'bad' changed", "Linear.forward became"),
    ),
    "patches-in-costs": (
        costs(f"{PATCH}; return Costs(parameters=d_model**2 + 1)"),
        "error", ("torch.nn.functional.softmax became",),
    ),
    "default-dtype": (
        forward("torch.set_default_dtype(torch.float64)", "return self.proj(x_BTD)"),
        "error", ("layer '{name}' (plugin 'bad') changed", "default dtype: torch.float32 became"),
    ),
    "threads": (
        constructor("torch.set_num_threads(3)"),
        "error", ("layer '{name}' (plugin 'bad') changed", "number of threads: 1 became 3"),
    ),
    "grad-mode": (
        forward("torch.set_grad_enabled(False)", "return self.proj(x_BTD)"),
        "error", ("grad mode: True became False",),
    ),
    "patches-and-raises": (
        forward(PATCH, "raise ValueError('and more')"),
        "error", ("softmax became", "also ended as error: ValueError: and more"),
    ),
}  # fmt: skip


def small(study_data, **changes):
    space = {"d_model": [8, 12, 16], "num_layers": 1, "placements": ["alternate"], **changes}
    return make_config(
        study_data,
        **{"space": space, "budget.trials": 4, "training.tokens": 256, "budget.retries": 0},
    )


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Figures of every good layout, from a study without bad ones: layout hash → metrics."""
    torch.set_num_threads(1)
    config = small(copy.deepcopy(STUDY), mixers=["other"])
    config = dataclasses.replace(config, budget=dataclasses.replace(config.budget, trials=3))
    trials = run_study(config, tmp_path_factory.mktemp("clean")).trials()
    return {t.data["layout_hash"]: t.metrics for t in trials if t.outcome == "complete"}


def plugin_of(faults: dict[str, str]) -> str:
    """A plugin with a layer of each name; glyphs are Chinese characters, to have enough."""
    body = LAYER.format(body="    pass\n")
    for number, fault in enumerate(faults.values()):
        body += f"class Bad_{number}(Fault):\n    glyph = {chr(0x4E00 + number)!r}\n{fault}\n"
    body += "@hookimpl\ndef register_layers(register):\n"
    return body + "".join(f"    register({n!r}, Bad_{i})\n" for i, n in enumerate(faults))


def run_all(faults: dict[str, str], folder: Path, executor: str):
    """A study in which each faulty layer, and a good one, makes one model."""
    write_plugin(folder / "faulty", "bad", plugin_of(faults))
    study_data = copy.deepcopy(STUDY)
    study_data["plugin_dirs"].append(str(folder / "faulty"))
    study_data["runtime"]["executor"] = executor
    study_data["sampler"] = {"class": "optuna.samplers.RandomSampler"}
    config = small(
        study_data,
        mixers=[*faults, "other"],
        d_model=8,
        placement={"alternate": {"second": "other"}},
    )
    budget = dataclasses.replace(config.budget, trials=len(faults) + 1)
    return run_study(dataclasses.replace(config, budget=budget), folder / "runs")


def judged(study, name: str):
    """The one trial of a study whose model has that layer."""
    (trial,) = (
        trial
        for trial in study.trials()
        if trial.outcome != "duplicate" and trial.layout.blocks[0].layer == name
    )
    return trial


def assert_recorded(trial, fault: tuple[str, str, tuple[str, ...]], name: str) -> None:
    _, outcome, words = fault
    assert trial.outcome == outcome, trial.reason
    for word in words:
        assert word.format(name=name) in trial.reason


def run_with(fault: str, study_data, tmp_path: Path):
    write_plugin(tmp_path / "faulty", "bad", LAYER.format(body=fault))
    study_data["plugin_dirs"].append(str(tmp_path / "faulty"))
    return run_study(small(study_data, mixers=["bad", "other"]), tmp_path / "runs")


def assert_others_unharmed(study, clean) -> None:
    good = [t for t in study.trials() if t.pattern == "o" and t.outcome != "duplicate"]
    assert good
    for trial in good:
        assert trial.outcome == "complete", trial.reason
        assert trial.metrics == clean[trial.data["layout_hash"]]


def bad_trials(study):
    bad = [t for t in study.trials() if t.pattern == "!" and t.outcome != "duplicate"]
    assert bad
    return bad


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory):
    """One study of all faults, in this process, which they must leave as it was."""
    torch.set_num_threads(1)
    shared = (F.softmax, torch.softmax, torch.nn.Linear.forward, torch.get_default_dtype())
    faults = {name: fault for name, (fault, _, _) in FAULTS.items()}
    study = run_all(faults, tmp_path_factory.mktemp("inline"), "inline")
    assert shared == (F.softmax, torch.softmax, torch.nn.Linear.forward, torch.get_default_dtype())
    assert torch.is_grad_enabled()
    assert torch.get_num_threads() == 1
    return study


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_layer_is_a_recorded_outcome(inline, name: str) -> None:
    assert_recorded(judged(inline, name), FAULTS[name], name)


def test_the_study_goes_on_and_finds_what_is_good(inline, clean) -> None:
    assert_others_unharmed(inline, clean)
    assert [trial.pattern for trial in inline.front_trials()] == ["o"]


IN_A_WORKER = {
    "leaks": FAULTS["leaks"],
    "patches": FAULTS["patches-in-forward"],
    "exits": FAULTS["exits"],
    "ends": (forward("os._exit(7)"), "crashed", ("the worker exited with status 7",)),
    "asks": (forward("self.read = sys.stdin.read()", "return self.proj(x_BTD)"), "complete", ()),
    "says": (
        forward("print('not a verdict'); os.write(1, b'nor this')", "return self.proj(x_BTD)"),
        "complete", (),
    ),
    "seeds": (
        forward("random.seed(); torch.manual_seed(os.getpid())", "return self.proj(x_BTD)"),
        "complete", (),
    ),
}  # fmt: skip


@pytest.mark.slow
def test_one_worker_after_another(tmp_path, clean) -> None:
    """All of them in one study, whose worker ends and starts again between them."""
    faults = {name: fault for name, (fault, _, _) in IN_A_WORKER.items()}
    study = run_all(faults, tmp_path, "process")
    for name, fault in IN_A_WORKER.items():
        assert_recorded(judged(study, name), fault, name)
    assert_others_unharmed(study, clean)
    good = [judged(study, name).metrics for name in ("asks", "says", "seeds")]
    assert good[0] == good[1] == good[2]


def test_a_layer_that_seeds_changes_nobodys_luck(study_data, tmp_path, clean) -> None:
    body = forward("random.seed(); torch.manual_seed(os.getpid())", "return self.proj(x_BTD)")
    before = (random.getstate(), torch.get_rng_state().tolist())
    study = run_with(body, study_data, tmp_path)
    assert {trial.outcome for trial in bad_trials(study)} == {"complete"}
    assert_others_unharmed(study, clean)
    assert (random.getstate(), torch.get_rng_state().tolist()) == before


def test_what_an_inline_layer_prints_is_no_result(study_data, tmp_path, clean, capfd) -> None:
    body = forward("print('said in forward'); os.system('echo by a child')", "return x_BTD")
    study = run_with(body, study_data, tmp_path)
    said = capfd.readouterr()
    assert {trial.outcome for trial in bad_trials(study)} == {"complete"}
    assert said.out == ""
    assert "said in forward" in said.err
    assert "by a child" in said.err


PLACEMENT = """
class Elsewhere(Placement):
    @classmethod
    def place(cls, num_layers, mixers, config):
        {line}

@hookimpl
def register_placements(register):
    register("elsewhere", Elsewhere)
"""


@pytest.mark.parametrize(
    ("line", "outcome", "words"),
    [
        ("sys.exit(3)", "error", "SystemExit: 3"),
        ("return None", "error", "TypeError"),
        ("return ('other',) * 7", "infeasible", "it owes 1 names"),
        (f"{PATCH}; return ('other',)", "error", "torch.nn.functional.softmax became"),
        ("torch.set_num_threads(3); return ('other',)", "error", "threads: 1 became 3"),
    ],
)
def test_a_bad_placement(study_data, tmp_path, line, outcome, words, clean) -> None:
    body = LAYER.format(body="    pass\n") + PLACEMENT.format(line=line)
    write_plugin(tmp_path / "faulty", "bad", body)
    study_data["plugin_dirs"].append(str(tmp_path / "faulty"))
    config = small(study_data, mixers=["other"], placements=["elsewhere", "alternate"])
    trials = 2 if outcome == "infeasible" else 6  # the others count
    config = dataclasses.replace(config, budget=dataclasses.replace(config.budget, trials=trials))
    study = run_study(config, tmp_path / "runs")
    bad = [t for t in study.trials() if t.params["placement"] == "elsewhere"]
    assert bad
    for trial in bad:
        assert trial.outcome == outcome, trial.reason
        assert words in trial.reason
    assert_others_unharmed(study, clean)


METRIC = """
class Odd(Metric):
    stage = "{stage}"
    def measure(self, subject):
        {line}

@hookimpl
def register_metrics(register):
    register("odd", Odd)
"""


@pytest.mark.parametrize("stage", ["static", "measured", "trained"])
@pytest.mark.parametrize(
    ("line", "outcome", "words"),
    [
        ("return 'many'", "error", "ValueError"),
        ("return None", "error", "TypeError"),
        ("return float('inf')", "diverged", "odd is inf"),
        ("sys.exit()", "error", "SystemExit"),
        (f"{PATCH}; return 1.0", "error", "torch.nn.functional.softmax became"),
    ],
)
def test_a_bad_metric(study_data, tmp_path, line, outcome, words, stage) -> None:
    body = LAYER.format(body="    pass\n") + METRIC.format(line=line, stage=stage)
    write_plugin(tmp_path / "faulty", "bad", body)
    study_data["plugin_dirs"].append(str(tmp_path / "faulty"))
    study_data["report"] = ["odd"]
    softmax = F.softmax
    study = run_study(make_config(study_data, **{"budget.trials": 1}), tmp_path / "runs")
    assert study.trial(0).outcome == outcome
    assert words in study.trial(0).reason
    assert F.softmax is softmax


def test_a_data_source_that_patches_is_refused_at_once(study_data, tmp_path) -> None:
    body = (
        LAYER.format(body="    pass\n")
        + f"class Patching(DataSource):\n    def __init__(self, config, **more):\n        {PATCH}\n"
        "        super().__init__(config, **more)\n    vocab_size = 8\n"
        "    def train_batch(self, *a): ...\n    def validation_batches(self, *a): ...\n"
        "    def describe(self): ...\n"
        "@hookimpl\ndef register_data_sources(register):\n    register('patching', Patching)\n"
    )
    write_plugin(tmp_path / "faulty", "bad", body)
    study_data["plugin_dirs"].append(str(tmp_path / "faulty"))
    softmax = F.softmax
    with pytest.raises(WorkbenchError, match=r"data source .* changed what all plugins share"):
        run_study(make_config(study_data, data={"source": "patching"}), tmp_path / "runs")
    assert F.softmax is softmax
    assert not (tmp_path / "runs" / "toys").exists()
