"""Configs and surroundings that nobody wrote: what check-plugin tests a stranger's thing with."""

from __future__ import annotations

import dataclasses
import os
from typing import Annotated, Any

import pytest

from workbench.builder import Builder
from workbench.config import Choice, Mixer, NoConfig, PerLayer, Range
from workbench.discovery import Provenance
from workbench.errors import FieldError
from workbench.layer import Layer
from workbench.testing.derived import UnderivableError, derived_configs, draws
from workbench.testing.surroundings import Surroundings
from workbench.testing.toy_layers import ToyMixer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    num_heads: Annotated[int, Choice(1, 2, 16)] = 2
    width: Annotated[int, Range(4, 64, step=4)] = 8
    gated: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixers:
    most: Annotated[str, Mixer("recurrent")]
    some: Annotated[str, Mixer()]
    free: Annotated[tuple[str, ...], PerLayer(Mixer())]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paths:
    paths: tuple[str, ...]


def anything(config: object) -> bool:
    return True


def test_a_mistake_of_the_thing_is_left_to_its_suite() -> None:
    def broken(config: object) -> bool:
        raise NameError("a slip in check or costs")

    assert derived_configs(Heads, broken)[0] == Heads()


def test_defaults_corners_and_flags() -> None:
    assert derived_configs(Heads, anything) == [
        Heads(),
        Heads(num_heads=1, width=4),
        Heads(num_heads=16, width=64),
        Heads(num_heads=16, width=64, gated=True),
    ]
    assert derived_configs(NoConfig, anything) == [NoConfig()]


def test_a_corner_stops_at_what_is_accepted() -> None:
    def fits(config: Heads) -> bool:
        if config.num_heads * config.width > 64:
            raise FieldError("width", "is too large")
        return not config.gated

    found = derived_configs(Heads, fits)
    assert (
        found == [Heads(), Heads(num_heads=1, width=4), Heads(num_heads=16, width=8)][: len(found)]
    )
    assert all(fits(config) for config in found)


def test_defaults_that_do_not_fit_give_way_to_a_draw() -> None:
    found = derived_configs(Heads, lambda config: config.num_heads == 16)
    assert found
    assert all(config.num_heads == 16 for config in found)


def test_required_fields_take_what_a_study_could_give_them() -> None:
    found = derived_configs(Mixers, anything)
    assert all(config.most == "mamba" for config in found)
    assert {config.some for config in found} == {"mamba", "attention"}
    assert {len(config.free) for config in found} == {4}


def test_what_cannot_be_derived_is_told_from_what_cannot_be_built() -> None:
    with pytest.raises(UnderivableError, match="paths: has neither a default nor a search range"):
        derived_configs(Paths, anything)
    with pytest.raises(FieldError, match="none of 200 draws") as caught:
        derived_configs(Heads, lambda config: False)
    assert not isinstance(caught.value, UnderivableError)


def test_draws_are_the_same_every_time_and_stay_in_range() -> None:
    drawn = list(draws(Heads, 30))
    assert drawn == list(draws(Heads, 30))
    assert {values["num_heads"] for values in drawn} == {1, 2, 16}
    assert list(draws(NoConfig, 30)) == [{}]


class Reader(ToyMixer):
    """Builds on an earlier toy of the same expansion."""

    @classmethod
    def source(cls, d_model, blocks):
        for index, block in enumerate(blocks[:-1]):
            if block.layer == "toy" and block.config["expand"] == blocks[-1].config["expand"]:
                return index
        raise FieldError("expand", "reads a toy of the same expand: place one below")


class Sharer(ToyMixer):
    """Takes its weights from the first of its kind."""

    @classmethod
    def source(cls, d_model, blocks):
        return 0 if len(blocks) > 1 else None


class LooksBack(ToyMixer):
    def forward(self, x_BTD, context=None, state=None):
        return super().forward(x_BTD + context.embedding_BTD, context, state)


def around(layer: type[Layer], *others: type[Layer]) -> Surroundings:
    builder = Builder.load()
    here = Provenance(plugin="toys", package=None, version="", module=__name__, file=__file__)
    for other in others:
        builder.layers.add("toy", other, here)
    return Surroundings("mine", layer, builder, 32)


def suite_around(layer: type[Layer]) -> Any:
    return type("Suite", (), around(layer).attributes([layer.Config()]))()


def test_most_layers_build_on_nothing() -> None:
    suite = suite_around(ToyMixer)
    assert (suite.name, suite.in_model) == ("mine", False)
    assert suite.earlier(ToyMixer.Config()) == []


def test_a_layer_that_builds_on_another_gets_one_that_it_accepts() -> None:
    found = around(Reader, ToyMixer)
    for expand in (1, 2):
        config = Reader.Config(expand=expand)
        ((name, layer, theirs),) = found.earlier(config)
        assert (name, layer, theirs.expand) == ("toy", ToyMixer, expand)


def test_a_layer_that_shares_its_weights_gets_itself() -> None:
    config = Sharer.Config()
    assert around(Sharer).earlier(config) == [("mine", Sharer, config)]


def test_a_layer_without_its_source_is_left_to_its_author() -> None:
    with pytest.raises(UnderivableError, match=r"expand: reads a toy .* \(no installed layer"):
        around(Reader).attributes([Reader.Config()])


def test_a_layer_that_looks_back_at_the_embedding_is_tested_in_a_model() -> None:
    assert suite_around(LooksBack).in_model is True


class EndsTheProcess(ToyMixer):
    def forward(self, x_BTD, context=None, state=None):
        os._exit(3)


def test_nothing_runs_before_there_is_a_check_to_fail() -> None:
    assert suite_around(EndsTheProcess).configs == [EndsTheProcess.Config()]


@pytest.mark.parametrize("answer", [None, 0, 1, 2, -1, "first", TypeError("planted")])
def test_a_source_of_whatever_faults_is_left_to_its_check(answer: object) -> None:
    class Faulty(ToyMixer):
        @classmethod
        def source(cls, d_model, blocks):
            if isinstance(answer, Exception):
                raise answer
            return answer

    suite = suite_around(Faulty)
    assert suite.configs == [Faulty.Config()]
    # 0 is right with another of its kind below it, and it alone.
    assert len(suite.earlier(Faulty.Config())) == (answer == 0)
