"""Enumeration: every layout of a space once, with parameters that suggest it again."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Annotated

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workbench.conftest import STUDY, TOYS, make_config
from workbench import Choice, Placement, WorkbenchError
from workbench.builder import Builder
from workbench.enumeration import Script, enumerate_space
from workbench.errors import FieldError
from workbench.replay import Replay
from workbench.space import Space

BUILDER = Builder.load((str(TOYS),))


def space(builder=BUILDER, **changes):
    config = make_config(STUDY, **{f"space.{name}": value for name, value in changes.items()})
    return Space(config.space, builder, 16)


def test_every_layout_once_by_hand():
    found = enumerate_space(space())
    # d_model x (1 layer: second mixer is not seen; toy in 4 widths or other; 2 layers: 4 pairs,
    # of which 3 hold a toy).
    assert len(found.layouts) == 3 * ((4 + 1) + (3 * 4 + 1))
    assert found.refused == {}
    # One layer: 2 x 2 choices, of which the 2 with toy first ask for a width.
    assert found.suggestions == 3 * ((2 * 4 + 2) + (3 * 4 + 1))
    assert found.duplicates == found.suggestions - len(found.layouts)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3, unique=True),
    st.sampled_from([[1], [1, 2], {"low": 1, "high": 3, "step": 2}, {"low": 1, "high": 2}]),
    st.sampled_from([["toy"], ["toy", "other"], ["full", "other"]]),
    st.sampled_from(["search", 1, [2, 1]]),
)
def test_parameters_suggest_their_layout_and_optuna_suggests_no_other(widths, depth, mixers, width):
    layers = {"toy": {"width": width}} if "toy" in mixers else {}
    made = space(
        d_model=[8 * factor for factor in widths], num_layers=depth, mixers=mixers, layers=layers
    )
    found = enumerate_space(made)
    by_hash = {item.layout.hash: item for item in found.layouts}
    assert len(by_hash) == len(found.layouts)
    for item in found.layouts:
        replay = Replay(item.params)
        assert made.suggest(replay) == item.layout
        assert replay.params == item.params
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(25):
        layout = made.suggest(study.ask())
        assert by_hash[layout.hash].layout == layout


@pytest.mark.parametrize(
    ("low", "high", "step"),
    [(0.1, 0.3, 0.1), (0.1, 0.7, 0.2), (0.5, 2.0, 0.4), (0.0, 1.0, 0.25), (0.7, 0.7, None)],
)
def test_steps_are_those_of_optuna(low, high, step):
    script, values = Script(), set()
    while True:
        values.add(script.suggest_float("gain", low, high, step=step, log=False))
        path = script.next_path()
        if path is None:
            break
        script = Script(path)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    with (
        pytest.warns(UserWarning, match="not divisible")
        if step == 0.4
        else contextlib.nullcontext()
    ):
        drawn = {study.ask().suggest_float("gain", low, high, step=step) for _ in range(60)}
    assert drawn == values


def test_a_parameter_asked_for_twice_is_one_parameter():
    seen = []
    path = []
    while path is not None:
        script = Script(path)
        first = script.suggest_categorical("a", ["x", "y"])
        seen.append((first, script.suggest_int("n", 1, 4, step=3), script.suggest_int("n", 1, 4)))
        path = script.next_path()
    assert seen == [("x", 1, 1), ("x", 4, 4), ("y", 1, 1), ("y", 4, 4)]


def test_continuous_parameters_are_refused_by_name():
    layers = {"toy": {"gain": "search"}}
    with pytest.raises(FieldError, match=r"toy\.gain: is continuous \(0.5 to 2\)"):
        enumerate_space(space(layers=layers))
    stepped = {"toy": {"gain": {"low": 0.5, "high": 2.0, "step": 0.5}}}
    layouts = enumerate_space(space(layers=stepped)).layouts
    assert {item.params.get("toy.gain") for item in layouts} == {None, 0.5, 1.0, 1.5, 2.0}


def test_too_many_layouts_are_counted():
    assert len(enumerate_space(space(), limit=54).layouts) == 54
    with pytest.raises(WorkbenchError, match=r"the space has 54 layouts, .*limit is 53 layouts"):
        enumerate_space(space(), limit=53)
    with pytest.raises(WorkbenchError, match="more than 40 combinations of parameters"):
        enumerate_space(space(), limit=1)


class Picky(Placement):
    @dataclass(frozen=True, kw_only=True)
    class Config:
        way: Annotated[str, Choice("good", "wrong", "broken")]

    @classmethod
    def place(cls, num_layers, mixers, config):
        if config.way == "wrong":
            raise FieldError("way", "cannot be wrong")
        if config.way == "broken":
            raise ZeroDivisionError("planted")
        return (mixers[0],) * num_layers


def test_what_cannot_be_built_is_counted_by_its_reason():
    builder = Builder.load((str(TOYS),))
    builder.placements.add("picky", Picky, builder.placements.provenance("alternate"))
    found = enumerate_space(space(builder, placements=["picky"]))
    assert found.refused == {"picky.way: cannot be wrong": 6, "ZeroDivisionError: planted": 6}
    assert len(found.layouts) == 3 * 2 * 4
    assert found.suggestions == 24 + 12
