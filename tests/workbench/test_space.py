"""The search space: what it draws, what it refuses, and its fingerprint."""

from __future__ import annotations

import optuna
import pytest

from tests.workbench.conftest import TOYS, make_config
from workbench import FieldError, UnknownNameError
from workbench.builder import default_builder
from workbench.space import Space


@pytest.fixture
def builder():
    return default_builder((str(TOYS),))


def make_space(builder, study_data, **changes):
    config = make_config(study_data, **{f"space.{key}": value for key, value in changes.items()})
    return Space(config.space, builder, 16)


def draw(space, count=60, seed=0):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    drawn = []
    for _ in range(count):
        trial = study.ask()
        drawn.append((space.suggest(trial), trial.params))
    return drawn


def test_layouts_come_from_the_offered_values_only(builder, study_data):
    space = make_space(builder, study_data, mlps=["none", "full"], quantizers=["none"])
    seen = set()
    for layout, params in draw(space):
        assert layout.d_model in (8, 12, 16)
        mixers = [block.layer for block in layout.blocks if block.layer != "full"]
        assert len(mixers) == params["num_layers"]
        assert set(mixers) <= {"toy", "other"}
        assert (params["mlp"] == "full") == any(b.layer == "full" for b in layout.blocks)
        for block in layout.blocks:
            if block.layer == "toy":
                assert block.config["width"] == params["toy.width"]
                assert block.config["gain"] == 1.0  # not named in the study: its default
        seen.add(layout.hash)
    assert len(seen) > 10


@pytest.mark.parametrize(
    ("field", "absent"),
    [("mixers", {"swiglu", "none"}), ("mlps", {"mamba", "toy"})],
)
def test_an_unknown_layer_is_compared_with_what_may_stand_there(builder, study_data, field, absent):
    with pytest.raises(UnknownNameError, match=f"layer in space.{field} 'mystery'") as caught:
        make_space(builder, study_data, **{field: ["mystery"]})
    assert absent.isdisjoint(caught.value.known)
    kinds = {builder.layers[name].kind == "mlp" for name in caught.value.known if name != "none"}
    assert kinds == {field == "mlps"}


def test_parameters_of_absent_layers_are_not_drawn(builder, study_data):
    for layout, params in draw(make_space(builder, study_data)):
        assert ("toy.width" in params) == any(b.layer == "toy" for b in layout.blocks)


def test_same_suggestions_same_layout(builder, study_data):
    space = make_space(builder, study_data)
    layout, params = draw(space, 1)[0]
    assert space.suggest(optuna.trial.FixedTrial(params)) == layout


def test_ranges_lists_and_scalars(builder, study_data):
    space = make_space(
        builder,
        study_data,
        d_model=8,
        num_layers={"low": 1, "high": 5, "step": 2},
        layers={"toy": {"width": 2, "gain": {"low": 0.5, "high": 2.0, "log": True}}},
    )
    drawn = draw(space)
    assert {layout.d_model for layout, _ in drawn} == {8}
    assert {params["num_layers"] for _, params in drawn} == {1, 3, 5}
    gains = [params["toy.gain"] for _, params in drawn if "toy.gain" in params]
    assert gains
    assert all(0.5 <= gain <= 2.0 for gain in gains)
    assert all("toy.width" not in params for _, params in drawn)


def test_fingerprint_follows_the_space_and_nothing_else(builder, study_data):
    one = make_space(builder, study_data)
    assert one.fingerprint == make_space(builder, study_data).fingerprint
    assert one.fingerprint != make_space(builder, study_data, d_model=[8, 12]).fingerprint
    assert one.fingerprint != make_space(builder, study_data, mixers=["toy", "full"]).fingerprint


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"mixers": ["tyo"]}, UnknownNameError, ["tyo", "Did you mean 'toy'"]),
        ({"mixers": []}, FieldError, ["space.mixers", "at least one"]),
        ({"mixers": ["toy", "toy"]}, FieldError, ["space.mixers", "twice"]),
        ({"placements": ["altrenate"]}, UnknownNameError, ["Did you mean 'alternate'"]),
        ({"quantizers": ["int9"]}, UnknownNameError, ["quantizer"]),
        ({"layers": {"toyy": {}}}, UnknownNameError, ["[space.layers]", "toyy"]),
        ({"layers": {"toy": {"wdith": 1}}}, UnknownNameError, ["Did you mean 'width'"]),
        ({"layers": {"toy": {"width": "wide"}}}, FieldError, ["space.layers.toy.width", "int"]),
        ({"layers": {"toy": {"width": [1, "two"]}}}, FieldError, ["width", "int"]),
        ({"layers": {"toy": 3}}, FieldError, ["space.layers.toy", "table"]),
        ({"d_model": "search"}, FieldError, ["space.d_model", "no search range"]),
        ({"d_model": {"low": 8}}, FieldError, ["space.d_model", "low, high"]),
        ({"d_model": {"low": 16, "high": 8}}, FieldError, ["above high"]),
        ({"d_model": [8, 8]}, FieldError, ["once"]),
    ],
)
def test_mistakes_are_refused_before_any_trial(builder, study_data, changes, error, words):
    with pytest.raises(error) as caught:
        make_space(builder, study_data, **changes)
    for word in words:
        assert word in str(caught.value)


def test_an_impossible_combination_names_its_field(study_data):
    builder = default_builder()
    space = make_space(
        builder,
        study_data,
        d_model=48,
        mixers=["attention"],
        placements=["uniform"],
        layers={"attention": {"num_heads": 6, "num_kv_heads": 4}},
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    with pytest.raises(FieldError, match="num_kv_heads"):
        space.suggest(study.ask())


@pytest.mark.parametrize("field", ["d_model", "num_layers"])
@pytest.mark.parametrize("value", [0, [0, 8], {"low": 0, "high": 8}])
def test_dimensions_below_one_are_refused(builder, study_data, field, value):
    with pytest.raises(FieldError, match=f"space.{field}.*at least 1"):
        make_space(builder, study_data, **{field: value})


def test_a_range_of_a_float_field_is_not_searched_in_integers(builder, study_data):
    layers = {"toy": {"gain": {"low": 1, "high": 2}}}
    gains = [
        p["toy.gain"]
        for _, p in draw(make_space(builder, study_data, layers=layers))
        if "toy.gain" in p
    ]
    assert any(gain != int(gain) for gain in gains)


@pytest.mark.parametrize("bad", [{"step": "2"}, {"log": "no"}, {"step": 0.5}])
def test_malformed_ranges_are_refused(builder, study_data, bad):
    with pytest.raises(FieldError, match=r"space\.num_layers"):
        make_space(builder, study_data, num_layers={"low": 1, "high": 4, **bad})


def test_search_takes_the_declared_mixers(builder, study_data):
    space = make_space(builder, study_data, placement={"alternate": {"first": "search"}})
    assert {p.get("alternate.first") for _, p in draw(space)} == {"toy", "other"}
