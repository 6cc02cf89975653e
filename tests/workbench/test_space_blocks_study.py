"""A study whose blocks choose on their own, from its search to confirmed, scaled and exported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.plugins.test_export import probe
from tests.workbench.conftest import STUDY, TOYS, make_config
from tests.workbench.studies import assert_all_accounted_for, run
from workbench import WorkbenchError
from workbench.builder import default_builder
from workbench.confirm import confirm
from workbench.evaluation import evaluate
from workbench.export import export_trial
from workbench.migrate import migrate
from workbench.oracle import Oracle, report
from workbench.quantizer import num_bytes
from workbench.records import Study, load_study
from workbench.scaling import scale
from workbench.scaling_pattern import Pattern
from workbench.scaling_placement import Placer, trial_policy
from workbench.training import load_weights
from workbench.trial import load_trained, make_data

BUILDER = default_builder((str(TOYS),))
# Two layers, each stored in one of two ways: four layouts.
STORED = {
    "space.d_model": 8,
    "space.num_layers": 2,
    "space.mixers": ["toy"],
    "space.layers": {},
    "space.quantizers": ["none", "int8"],
    "space.per_block": ["quantizer"],
    "budget.trials": 3,
}
ALL = {
    "name": "grown",
    "space.mlps": ["none", "swiglu"],
    "space.quantizers": ["none", "int8"],
    "space.per_block": ["quantizer", "mlp", "layers"],
}


def is_mixed(layout):
    return len({block.quantizer for block in layout.blocks}) > 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("per-block") / "runs"
    run(STUDY, runs, **STORED)
    return runs


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "runs"))


def test_each_block_is_judged_as_it_is_stored(finished):
    study = load_study("toys", finished)
    assert_all_accounted_for(study)
    complete = [trial for trial in study.trials() if trial.outcome == "complete"]
    assert len(complete) == 3  # of four: one at least is stored in two ways
    config = make_config(STUDY, **STORED)
    data = make_data(config, BUILDER, finished / ".cache")
    for trial in complete:
        stored = [trial.params.get(f"quantizer.{index}") for index in range(2)]
        names = [
            block.quantizer.name if block.quantizer else "none" for block in trial.layout.blocks
        ]
        assert names == stored
        reports = trial.data["details"]["quantization"]
        assert [bool(found) for found in reports] == [name == "int8" for name in names]
        model = load_trained(BUILDER, trial.layout, trial.weights)
        length, rows = config.training["seq_len"], config.training["batch_size"]
        assert evaluate(model, data, rows, length).bits_per_byte == trial.metrics["toy_loss"]
        costs = BUILDER.costs(trial.layout, length=1)
        built = [num_bytes(layer) for layer in model.layers]
        norm = 4 * trial.layout.d_model
        assert [row.weight_bytes for row in costs.blocks] == [size + norm for size in built]
        assert (built[0] < built[1]) == (names == ["int8", "none"])


def test_records_hold_a_column_a_parameter(finished):
    frame = load_study("toys", finished).frame()
    assert set(frame["param.quantizer.0"]) | set(frame["param.quantizer.1"]) == {"none", "int8"}


def test_finalists_are_confirmed(runs):
    study = confirm("toys", runs, seeds=2)
    assert [point.number for point in study.confirmed()] == sorted(
        trial.number for trial in study.front_trials()
    )


def test_a_running_study_does_not_begin_to_choose_for_each_block(runs):
    with pytest.raises(WorkbenchError, match=r"space.per_block: \['quantizer'\] then, None now"):
        run(STUDY, runs, **{**STORED, "space.per_block": []})


def test_finished_trials_go_on_where_blocks_choose_on_their_own(runs):
    run(STUDY, runs, **{"name": "plain", "budget.trials": 2})
    done = migrate("plain", make_config(STUDY, **{**ALL, "budget.trials": 3}), runs)
    assert done.left_out == {}
    assert len(done.numbers) == len(Study(runs / "plain").trials())
    for trial in done.study.trials():
        names = {name.rpartition(".")[0] for name in trial.params if name[-1].isdigit()}
        toys = any(block.layer == "toy" for block in trial.layout.blocks)
        assert names == {"mlp", "quantizer"} | ({"toy.width"} if toys else set())
    assert_all_accounted_for(done.study)
    went_on = run(STUDY, runs, **{**ALL, "budget.trials": 3})
    assert_all_accounted_for(went_on)
    new = [trial for trial in went_on.trials() if "migrated_from" not in trial.data]
    assert new
    assert all({"mlp.0", "quantizer.0"} <= trial.params.keys() for trial in new)


def test_the_whole_space_is_judged_and_held_against_the_search(runs):
    oracle = Oracle(make_config(STUDY, **STORED), runs)
    assert len(oracle.enumeration.layouts) == 2**2
    truth = oracle.tabulate()
    trials = truth.trials()
    assert {trial.outcome for trial in trials} == {"complete"}
    found = report(load_study("toys", runs), truth)
    assert found.outcomes == {"complete": 4}
    assert 0 <= found.evaluations[-1].regret <= found.evaluations[0].regret <= 1


def test_a_trial_is_scaled_by_its_policy_though_its_layers_differ(runs):
    changes = {**STORED, **ALL, "name": "deep", "space.num_layers": 5, "budget.trials": 2}
    changes["space.mixers"] = ["toy", "other"]
    study = run(STUDY, runs, **changes)
    config = make_config(STUDY, **changes)
    several = 0
    for trial in study.trials():
        layout = trial.layout
        pattern = Pattern.of(layout.blocks, lambda name: name == "swiglu")
        several += len(set(pattern.kinds)) > 2
        placer = Placer(pattern, trial_policy(trial, config, BUILDER, layout, pattern))
        made = scale(BUILDER, layout, placer, 200_000, num_layers=10)
        assert made.placement.startswith("alternate with the trial's parameters")
        mixers = [block.layer for block in layout.blocks if block.layer != "swiglu"]
        placed = [block.layer for block in made.layout.blocks if block.layer != "swiglu"]
        assert placed == (mixers[:2] * 5)
        model = BUILDER.build(made.layout, device="meta")
        assert sum(parameter.numel() for parameter in model.parameters()) == made.parameters
    assert several


@pytest.mark.slow
def test_a_trial_stored_in_two_ways_leaves_as_it_was_judged(tmp_path, prepared):
    """The logits of a fresh process that has no workbench are those of the trial."""
    changes = {
        **STORED,
        "space.d_model": 32,
        "space.mixers": ["mamba2", "attention"],
        "space.placements": ["free"],
        "space.quantizers": ["none", "int4"],
        "space.mlps": ["swiglu"],
        "space.layers": {
            "mamba2": {"d_state": 8, "headdim": 16},
            "attention": {"head_dim": 16},
        },
    }
    study = run(STUDY, tmp_path / "runs", **changes)
    best = next(trial for trial in study.front_trials() if is_mixed(trial.layout))
    made = export_trial(best, tmp_path / "model")
    assert made.max_difference <= 1e-5
    tokens = torch.randint(16, (2, 40), generator=torch.Generator().manual_seed(0))
    seen = probe(BUILDER, made.path, tokens, prepared)["logits"]
    judged = load_trained(BUILDER, best.layout, best.weights)
    as_trained = BUILDER.build(best.layout)
    load_weights(as_trained, best.weights)
    with torch.no_grad():
        torch.testing.assert_close(judged(tokens), seen, atol=1e-5, rtol=0)
        assert (as_trained.eval()(tokens) - seen).abs().max() > 1e-4
    stored = load_file(made.path / "model.safetensors")
    packed = {name.split(".")[2] for name in stored if name.endswith(".weight_packed")}
    wanted = {str(n) for n, block in enumerate(best.layout.blocks) if block.quantizer is not None}
    assert packed == wanted
