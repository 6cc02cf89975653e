"""Samplers that see layouts: what they suggest in a real study, and from what."""

from __future__ import annotations

import json
import random

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from tests.workbench.conftest import make_config
from workbench import sampler as samplers
from workbench.builder import default_builder
from workbench.errors import FieldError
from workbench.layout import Layout
from workbench.records import Study
from workbench.sampler import LayoutSampler, Near, SurrogateSampler, View
from workbench.space import Space
from workbench.storage import make_sampler
from workbench.study import run_study

SURROGATE = "workbench.sampler.SurrogateSampler"


@pytest.fixture
def space(study_data) -> Space:
    config = make_config(study_data)
    return Space(config.space, default_builder(config.plugin_dirs), 64)


def sizes(layout: Layout) -> dict[str, float]:
    """Figures that a layout alone tells: they pull against each other."""
    return {"width": float(layout.d_model), "depth": 1.0 / len(layout.blocks)}


def asked(space: Space, sampler: SurrogateSampler, exact, names, count: int, judge):
    """A search by hand, as the scheduler does it: the layouts in order."""
    study = optuna.create_study(directions=["minimize"] * len(names), sampler=sampler)
    view, found = View(space, exact, names), []
    for _ in range(count):
        trial = study.ask()
        sampler.look(study, view)
        found.append(space.suggest(trial))
        study.tell(trial, judge(found[-1]))
    return found


def test_nothing_is_tried_twice_while_something_is_new(space):
    names = ("width", "depth")
    sampler = SurrogateSampler(0, startup=2)
    found = asked(space, sampler, sizes, names, 12, lambda layout: tuple(sizes(layout).values()))
    assert len({layout.hash for layout in found}) == 12


def test_exact_objectives_are_searched_without_a_detour(space):
    """What is exact needs no model: once there is a front, its best new layout comes next."""
    sampler = SurrogateSampler(0, startup=2, candidates=400)
    names = ("width", "depth")
    found = asked(space, sampler, sizes, names, 5, lambda layout: tuple(sizes(layout).values()))
    widths, depths = {layout.d_model for layout in found}, {len(layout.blocks) for layout in found}
    assert min(widths) == 8
    assert {1, 2} <= depths or {2, 4} <= depths
    best = min(found, key=lambda layout: (layout.d_model, -len(layout.blocks)))
    assert best in found[:4]


def test_infeasible_layouts_are_no_candidates(space):
    def exact(layout: Layout):
        return None if layout.d_model == 8 else sizes(layout)

    sampler = SurrogateSampler(1, startup=3)
    names = ("width", "depth")
    found = asked(space, sampler, exact, names, 10, lambda layout: tuple(sizes(layout).values()))
    assert all(layout.d_model > 8 for layout in found)


def test_layouts_that_fail_to_tell_are_tried_all_the_same(space):
    """Whatever is wrong with them, a trial must show it."""
    sampler = SurrogateSampler(1, startup=2)
    names = ("width", "depth")

    def exact(layout: Layout):
        return {} if layout.d_model == 12 else sizes(layout)

    found = asked(space, sampler, exact, names, 14, lambda layout: tuple(sizes(layout).values()))
    assert any(layout.d_model == 12 for layout in found)


def test_the_same_history_and_seed_suggest_the_same(space):
    names = ("loss",)

    def judge(layout: Layout):
        return layout.d_model % 5 + len(layout.blocks)

    runs = [
        asked(space, SurrogateSampler(7, startup=3), lambda layout: {}, names, 8, judge)
        for _ in range(2)
    ]
    assert [layout.hash for layout in runs[0]] == [layout.hash for layout in runs[1]]
    other = asked(space, SurrogateSampler(8, startup=3), lambda layout: {}, names, 8, judge)
    assert [layout.hash for layout in other] != [layout.hash for layout in runs[0]]


def test_a_study_is_searched_with_it_and_resumed(study_data, runs):
    table = {"class": SURROGATE, "startup": 2, "candidates": 16}
    whole = make_config(study_data, sampler=table, **{"budget.trials": 6})
    run_study(whole, runs / "whole")
    for trials in (3, 6):
        run_study(make_config(study_data, sampler=table, **{"budget.trials": trials}), runs / "two")

    def hashes(folder):
        trials = Study(folder / "toys").trials()
        return [trial.data["layout_hash"] for trial in trials if trial.outcome == "complete"]

    assert len(set(hashes(runs / "whole"))) == 6
    assert hashes(runs / "two") == hashes(runs / "whole")


def test_static_constraints_cost_no_trial(study_data, runs):
    """They are known of a candidate, as those of later stages are not."""
    run_study(make_config(study_data, **{"budget.trials": 6}), runs / "free")
    weights = [trial.metrics["toy_weights"] for trial in Study(runs / "free" / "toys").trials()]
    limit = sorted(weights)[2]
    study_data["constraints"] = {"toy_weights": {"max": limit}}
    table = {"class": SURROGATE, "startup": 2}
    run_study(make_config(study_data, sampler=table, **{"budget.trials": 4}), runs)
    trials = Study(runs / "toys").trials()
    assert [trial.outcome for trial in trials] == ["complete"] * 4
    assert all(trial.metrics["toy_weights"] <= limit for trial in trials)


def test_near_layouts_keep_what_they_can(space):
    dice = random.Random(0)
    params = {"d_model": 12, "num_layers": 2, "not there": 3}
    same = [space.suggest(Near(params, 0.0, dice)) for _ in range(5)]
    assert {(layout.d_model, len(layout.blocks)) for layout in same} == {(12, 2)}
    assert len({space.suggest(Near(params, 1.0, dice)).d_model for _ in range(30)}) == 3


@pytest.mark.parametrize(
    "arguments", [{"startup": 0}, {"candidates": 0}, {"optimism": -1.0}, {"knwon": 3}]
)
def test_bad_arguments_are_refused_by_name(arguments):
    with pytest.raises(FieldError, match="sampler"):
        make_sampler({"class": SURROGATE, **arguments}, 0)


def test_a_sampler_of_ones_own_is_shown_the_space(study_data, runs, tmp_path, monkeypatch):
    (tmp_path / "narrow.py").write_text(
        "from workbench.sampler import LayoutSampler\n"
        "class Narrowest(LayoutSampler):\n"
        "    def choose(self, study, view):\n"
        "        return {'d_model': 8}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    table = {"class": "narrow.Narrowest"}
    run_study(make_config(study_data, sampler=table, **{"budget.trials": 3}), runs)
    layouts = [json.loads(path.read_text()) for path in runs.glob("toys/trials/*/layout.json")]
    assert layouts
    assert all(layout["d_model"] == 8 for layout in layouts)
    assert issubclass(SurrogateSampler, LayoutSampler)


class Chosen(LayoutSampler):
    """Suggests what it is given."""

    def __init__(self) -> None:
        super().__init__(0)
        self.params: dict[str, object] = {}

    def choose(self, study, view):
        return self.params


def test_a_trial_that_waits_has_no_layout_yet(space):
    """A retry waits in the queue without parameters: it must not be taken for anything."""
    study = optuna.create_study()
    study.enqueue_trial({"d_model": 8, "num_layers": 1})
    view = View(space, lambda layout: {}, ("loss",))
    assert view.of(study.get_trials()[0]) is None
    trial = study.ask()
    layout = space.suggest(trial)
    study.tell(trial, 1.0)
    assert view.of(study.get_trials()[0]).layout_hash == layout.hash


def test_a_trial_that_ended_amid_its_suggestion_has_no_layout(space):
    study = optuna.create_study()
    study.enqueue_trial({"d_model": 8})
    trial = study.ask()
    trial.suggest_categorical("d_model", [8, 12, 16])
    study.tell(trial, state=TrialState.FAIL)
    view = View(space, lambda layout: {}, ("loss",))
    assert view.of(study.get_trials()[0]) is None


def test_floats_with_a_step_stay_within_their_bounds(study_data):
    """0.1 * 3 is more than 0.3, which Optuna would not take back."""
    gain = {"low": 0.0, "high": 0.3, "step": 0.1}
    config = make_config(study_data, **{"space.layers": {"toy": {"gain": gain}}})
    space = Space(config.space, default_builder(config.plugin_dirs), 64)
    view, dice = View(space, lambda layout: {}, ("loss",)), random.Random(0)
    params = [view.draw(samplers.RandomSuggester(dice)).params for _ in range(40)]
    gains = {found["toy.gain"] for found in params if "toy.gain" in found}
    assert len(gains) == 4
    assert all(FloatDistribution(**gain)._contains(value) for value in gains)


def test_numbers_of_numpys_become_pythons_and_strange_ones_are_refused(space):
    sampler = Chosen()
    study = optuna.create_study(sampler=sampler)
    view = View(space, lambda layout: {}, ("loss",))
    sampler.params = {"d_model": np.int64(12), "x": np.float32(0.5)}
    sampler.look(study, view)
    trial = study.ask()
    assert type(space.suggest(trial).d_model) is int
    assert type(trial.suggest_float("x", 0.0, 1.0)) is float
    sampler.params = {"n": 9}
    sampler.look(study, view)
    with pytest.raises(ValueError, match="n = 9"):
        study.ask().suggest_int("n", 1, 8)


def test_what_was_judged_is_not_kept_for_ever(space, monkeypatch):
    monkeypatch.setattr(samplers, "REMEMBERED", 5)
    view, dice = View(space, sizes, ("width", "depth")), random.Random(0)
    hashes = {view.draw(samplers.RandomSuggester(dice)).layout_hash for _ in range(60)}
    assert len(hashes) > 10
    assert len(view._judged) == 5


def test_what_fails_is_not_sought(study_data):
    """Nobody knows more of it after a failure; a model of what ended alone would be drawn there."""
    table = {"d_model": {"low": 8, "high": 256, "step": 8}, "num_layers": [1, 2, 3, 4]}
    config = make_config(study_data, **{f"space.{name}": value for name, value in table.items()})
    space = Space(config.space, default_builder(config.plugin_dirs), 64)
    sampler = SurrogateSampler(0, candidates=32)
    study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
    view, failed = View(space, lambda layout: {}, ("loss", "size")), []
    for _ in range(40):
        trial = study.ask()
        sampler.look(study, view)
        layout = space.suggest(trial)
        size = float(layout.d_model * len(layout.blocks))
        failed.append(layout.blocks[0].layer == "other")
        if failed[-1]:
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, (size**-0.3, size))
    assert sum(failed[:10]) > 0
    assert sum(failed[20:]) <= 3


FAULTY = """
import torch
from tests.workbench.toy_plugins.toys import Alternate, Toy
from workbench import hookimpl
class Raising(Alternate):
    @classmethod
    def place(cls, num_layers, mixers, config):
        if num_layers == 2:
            raise {raised}
        return Alternate.place(num_layers, mixers, config)
class Patching(Toy):
    glyph = "P"
    def __init__(self, d_model, config, **factory):
        super().__init__(d_model, config, **factory)
        torch.relu = abs
@hookimpl
def register_layers(register):
    register("patching", Patching)
@hookimpl
def register_placements(register):
    register("raising", Raising)
"""


@pytest.mark.parametrize("raised", ["ValueError", "SystemExit"])
def test_a_policy_that_raises_is_the_fault_of_no_other_trial(study_data, runs, tmp_path, raised):
    (tmp_path / "faulty_plugin.py").write_text(FAULTY.format(raised=raised))
    study_data["plugin_dirs"].append(str(tmp_path))
    study_data["space"]["placements"] = ["alternate", "raising"]
    table = {"class": SURROGATE, "startup": 2}
    run_study(make_config(study_data, sampler=table), runs)
    assert [trial.outcome for trial in Study(runs / "toys").trials()] == ["complete"] * 4


def test_a_layer_that_patches_is_the_fault_of_its_own_trials(study_data, runs, tmp_path):
    (tmp_path / "faulty_plugin.py").write_text(FAULTY.format(raised="ValueError"))
    study_data["plugin_dirs"].append(str(tmp_path))
    study_data["space"]["mixers"] = ["toy", "patching"]
    table = {"class": SURROGATE, "startup": 2}
    run_study(make_config(study_data, sampler=table, **{"budget.trials": 8}), runs)
    trials = Study(runs / "toys").trials()
    for trial in trials:
        patches = any(block.layer == "patching" for block in trial.layout.blocks)
        assert trial.outcome == ("error" if patches else "complete"), trial.reason
    assert {trial.outcome for trial in trials} == {"error", "complete"}
