"""Choices for each block on its own: their names, what they leave alone, and the way back."""

from __future__ import annotations

import itertools
import random

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workbench.conftest import STUDY, TOYS, make_config
from workbench import FieldError, UnknownNameError
from workbench.builder import default_builder
from workbench.enumeration import enumerate_space
from workbench.replay import Replay, replayed
from workbench.space import Space
from workbench.space_blocks import PER_BLOCK, stored_as
from workbench.storage import make_sampler

BUILDER = default_builder((str(TOYS),))
SUBSETS = [list(names) for size in range(4) for names in itertools.combinations(PER_BLOCK, size)]
EVERYTHING = {
    "mixers": ["other", "toy"],
    "mlps": ["none", "full"],
    "quantizers": ["none", "int8"],
    "layers": {"toy": {"width": [1, 2], "gain": "search"}, "full": {"width": [1, 2]}},
    "quantizer": {"int8": {"group_size": [32, 64]}},
}


def make_space(**changes):
    changes = {**EVERYTHING, **changes}
    return Space(
        make_config(STUDY, **{f"space.{k}": v for k, v in changes.items()}).space, BUILDER, 16
    )


class Drawn:
    """Draws at random and remembers; a parameter asked for twice is one parameter."""

    def __init__(self, seed=0):
        self._random = random.Random(seed)
        self.params = {}

    def suggest_categorical(self, name, choices):
        return self.params.setdefault(name, self._random.choice(choices))

    def suggest_int(self, name, low, high, *, step, log):
        return self.params.setdefault(name, self._random.randrange(low, high + 1, step))

    def suggest_float(self, name, low, high, *, step, log):
        return self.params.setdefault(name, self._random.uniform(low, high))


def drawn(space, count=20, seed=0):
    found = []
    for number in range(count):
        trial = Drawn(seed + number)
        found.append((space.suggest(trial), trial.params))
    return found


def chosen(layout, what):
    """What each block, or each layer, of a layout of `toy` and `full` chose."""
    names = [block.layer for block in layout.blocks] + ["toy"]
    if what == "mlp":
        return [after for name, after in itertools.pairwise(names) if name == "toy"]
    if what == "quantizer":
        return [block.quantizer for block in layout.blocks]
    return [str(block.config) for block in layout.blocks if block.layer == "toy"]


def test_default_spaces_are_what_they_were():
    """Studies from before there was a choice a block go on: figures of that version."""
    plain = Space(make_config(STUDY).space, BUILDER, 16)
    assert plain.fingerprint == "f0c126896bc4"
    assert "per_block" not in plain.to_dict()
    large = make_space(
        mlps=["none", "full", "swiglu"],
        mixers=["other", "toy", "full"],
        quantizers=["none", "int8", "int4"],
        layers={
            "toy": {"width": "search", "gain": "search"},
            "full": {"width": "search"},
            "swiglu": {"expand": "search"},
        },
        quantizer={"int8": {"group_size": "search"}},
    )
    assert large.fingerprint == "f54c77f11017"


def test_parameters_of_all_blocks_are_asked_for_in_the_order_they_were():
    orders = {tuple(params) for _, params in drawn(make_space(num_layers=2), 200)}
    assert not any(name[-1].isdigit() for order in orders for name in order)
    assert (
        "d_model", "alternate.first", "alternate.second", "mlp", "toy.width", "toy.gain",
        "full.width", "quantizer", "int8.group_size",
    ) in orders  # fmt: skip


def test_parameters_of_single_blocks_are_named_by_their_layer():
    space = make_space(per_block=["layers", "mlp", "quantizer"], num_layers=2)
    orders = {tuple(params) for _, params in drawn(space, 1500)}
    assert (
        "d_model", "alternate.first", "alternate.second", "mlp.0", "mlp.1",
        "toy.width.0", "toy.gain.0", "mlp.full.width.0", "toy.width.1", "toy.gain.1",
        "quantizer.0", "mlp.quantizer.0", "mlp.int8.group_size.0",
        "quantizer.1", "int8.group_size.1",
    ) in orders  # fmt: skip


@pytest.mark.parametrize("per_block", SUBSETS, ids="+".join)
def test_what_is_named_differs_from_block_to_block_and_nothing_else_does(per_block):
    space = make_space(per_block=per_block, mixers=["toy"], placements=["alternate"], num_layers=3)
    layouts = [layout for layout, _ in drawn(space, 40)]
    for what in PER_BLOCK:
        differs = any(len(set(chosen(layout, what))) > 1 for layout in layouts)
        assert differs == (what in per_block)


def test_a_layer_that_is_mixer_and_mlp_is_drawn_for_each():
    space = make_space(mixers=["full"], layers={"full": {"width": [1, 2]}}, per_block=["layers"])
    seen = set()
    for layout, params in drawn(space, 60):
        if params["num_layers"] == 1 and len(layout.blocks) == 2:
            mixer, mlp = layout.blocks
            assert mixer.config["width"] == params["full.width.0"]
            assert mlp.config["width"] == params["mlp.full.width.0"]
            seen.add((mixer.config["width"], mlp.config["width"]))
    assert seen == {(1, 1), (1, 2), (2, 1), (2, 2)}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SUBSETS), st.sampled_from(SUBSETS), st.integers(0, 10**6))
def test_layouts_are_suggested_again_where_more_is_chosen_for_each_block(less, more, seed):
    """As `workbench migrate` needs it; also with a layer that is offered as mixer and as MLP."""
    offered = {"mixers": ["other", "full"], "layers": {"full": {"width": [1, 2, 3]}}}
    old = make_space(per_block=less, num_layers=[1, 3], **offered)
    new = make_space(per_block=sorted({*less, *more}), num_layers=[1, 2, 3], **offered)
    trial = Drawn(seed)
    layout = old.suggest(trial)
    found, reason = replayed(new, layout, trial.params, {})
    assert reason == ""
    assert isinstance(found, Replay)
    assert new.suggest(Replay(found.params)) == layout
    back, _ = replayed(old, layout, found.params, {})
    assert back is not None
    assert back.params == trial.params


def test_a_value_that_a_larger_space_lacks_is_named():
    trial = Drawn(1)
    layout = make_space(mixers=["toy"], layers={"toy": {"width": 4}}, mlps=["none"]).suggest(trial)
    new = make_space(
        mixers=["toy"], layers={"toy": {"width": [1, 2]}}, mlps=["none"], per_block=["layers"]
    )
    found, reason = replayed(new, layout, trial.params, {})
    assert found is None
    assert reason == "toy.width.0 = 4 is not in the new space"


def test_many_layers_that_were_all_alike_are_found_again_at_once():
    """Not by trying values: there are 2 ** 24 of them."""
    old = make_space(num_layers=24, mixers=["toy"], mlps=["full"])
    new = make_space(num_layers=24, mixers=["toy"], mlps=["full"], per_block=list(PER_BLOCK))
    for layout, params in drawn(old, 5):
        asked = []
        suggest = new.suggest
        new.suggest = lambda trial, suggest=suggest, asked=asked: asked.append(1) or suggest(trial)
        found, reason = replayed(new, layout, params, {})
        new.suggest = suggest
        assert (reason, len(asked)) == ("", 1)
        assert len(found.params) >= 24 * 4


@pytest.mark.parametrize("per_block", SUBSETS, ids="+".join)
def test_every_layout_is_counted_once(per_block):
    """By hand: in a layer, widths, ways to be stored, and the same of an MLP or none."""
    space = make_space(
        d_model=8,
        num_layers=2,
        mixers=["toy"],
        layers={"toy": {"width": [1, 2]}, "full": {"width": [1, 2, 3]}},
        quantizer={},
        per_block=per_block,
    )
    widths, stored, mlps = 2, 2, 3
    many = {name: 2 if name in per_block else 1 for name in PER_BLOCK}
    expected = 0
    for followed in [(0, 0), (1, 0), (0, 1), (1, 1)] if many["mlp"] == 2 else [(0, 0), (1, 1)]:
        full = sum(followed)
        of_configs = widths ** many["layers"] * mlps ** (
            full if many["layers"] == 2 else min(full, 1)
        )
        expected += of_configs * stored ** (2 + full if many["quantizer"] == 2 else 1)
    found = enumerate_space(space, 2000)
    assert len(found.layouts) == found.suggestions == expected
    assert found.refused == {}
    for item in found.layouts[:: max(1, expected // 20)]:
        assert space.suggest(Replay(item.params)) == item.layout


def test_a_single_choice_asks_for_nothing_and_changes_no_layout():
    single = {"mixers": ["toy"], "mlps": ["full"], "quantizers": ["int8"], "quantizer": {}}
    plain = make_space(**single, layers={})
    each = make_space(**single, layers={}, per_block=list(PER_BLOCK))
    assert enumerate_space(each) == enumerate_space(plain)
    assert each.fingerprint != plain.fingerprint


def test_the_fingerprint_follows_what_is_chosen_for_each_block():
    prints = [make_space(per_block=per_block).fingerprint for per_block in SUBSETS]
    assert len(set(prints)) == len(SUBSETS)
    turned = make_space(per_block=["layers", "quantizer", "mlp"])
    assert turned.fingerprint == make_space(per_block=list(PER_BLOCK)).fingerprint


@pytest.mark.parametrize(
    ("per_block", "error", "words"),
    [
        (["quantizers"], UnknownNameError, ["space.per_block", "Did you mean 'quantizer'"]),
        (["placement"], UnknownNameError, ["layers, mlp, quantizer"]),
        (["mlp", "mlp"], FieldError, ["space.per_block", "twice"]),
        ("mlp", FieldError, ["space.per_block", "tuple"]),
    ],
)
def test_mistakes_are_refused(per_block, error, words):
    with pytest.raises(error) as caught:
        make_space(per_block=per_block)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({}, None),
        ({"quantizer": "int8", "int8.group_size": 64}, "int8"),
        ({"quantizer.0": "int8", "mlp.quantizer.0": "int8", "quantizer.12": "int8"}, "int8"),
        (
            {"quantizer.0": "int8", "mlp.quantizer.0": "none", "quantizer.1": "int8"},
            "int8 ×2, none ×1",
        ),
    ],
)
def test_how_a_trial_is_stored_is_said_in_a_few_words(params, said):
    assert stored_as(params) == said


def test_optuna_suggests_deep_layouts_with_many_conditional_parameters():
    """TPE in groups, past its random start: no name changes its distribution, none is lost."""
    space = make_space(num_layers=[4, 6], per_block=list(PER_BLOCK))
    sampler = make_sampler({"n_startup_trials": 4}, seed=0)
    study = optuna.create_study(sampler=sampler, directions=["minimize"] * 2)
    for _ in range(10):
        trial = study.ask()
        layout = space.suggest(trial)
        assert space.suggest(optuna.trial.FixedTrial(trial.params)) == layout
        read = next(space.read(layout))
        own = {name: value for name, value in trial.params.items() if name[-1].isdigit()}
        assert own.items() <= read.items()
        costs = BUILDER.costs(layout, length=16)
        study.tell(trial, [costs.total.parameters, costs.weight_bytes])
