"""PlacementContract passes on honest policies, and each of its tests finds its fault."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Annotated

import pytest

from tests.workbench.testing.running import failure, suite_tests
from workbench.config import Mixer, PerLayer, Range
from workbench.errors import FieldError
from workbench.placement import Placement
from workbench.testing import PlacementContract


class EveryNth(Placement):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        most: Annotated[str, Mixer("recurrent")] = "mamba"
        other: Annotated[str, Mixer("attention")] = "attention"
        period: Annotated[int, Range(2, 4)] = 3

    reference = "tests"

    @classmethod
    def place(cls, num_layers, mixers, config):
        if num_layers < config.period:
            raise FieldError("period", f"{config.period} is above {num_layers}")
        return tuple(config.most if n % config.period else config.other for n in range(num_layers))


class Listed(Placement):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        names: Annotated[tuple[str, ...], PerLayer(Mixer())] = ("mamba", "attention")

    reference = "tests"

    @classmethod
    def place(cls, num_layers, mixers, config):
        if len(config.names) != num_layers:
            raise FieldError("names", f"{len(config.names)} names for {num_layers} layers")
        return config.names


class TestEveryNth(PlacementContract):
    placement = EveryNth
    configs = (EveryNth.Config(), EveryNth.Config(most="attention", other="mamba"))


class TestListed(PlacementContract):
    placement = Listed
    configs = (Listed.Config(),)


class PlacesOneTooMany(EveryNth):
    @classmethod
    def place(cls, num_layers, mixers, config):
        extra = num_layers == 48
        return super().place(num_layers, mixers, config) + ("mamba",) * extra


class PlacesTheUnoffered(EveryNth):
    @classmethod
    def place(cls, num_layers, mixers, config):
        return (*super().place(num_layers, mixers, config)[:-1], "mlp")


class PlacesAList(EveryNth):
    @classmethod
    def place(cls, num_layers, mixers, config):
        return list(super().place(num_layers, mixers, config))


class PlacesNothing(EveryNth):
    @classmethod
    def place(cls, num_layers, mixers, config):
        raise FieldError("period", "never fits")


class NamesNoField(EveryNth):
    @classmethod
    def place(cls, num_layers, mixers, config):
        if num_layers == 1:
            raise FieldError("num_layers", "too few")
        return super().place(num_layers, mixers, config)


class Rolls(EveryNth):
    dice = random.Random(0)

    @classmethod
    def place(cls, num_layers, mixers, config):
        return tuple(cls.dice.choice(mixers) for _ in range(num_layers))


class ConsumesTheOffer(EveryNth):
    @classmethod
    def place(cls, num_layers, mixers, config):
        placed = super().place(num_layers, mixers, config)
        if isinstance(mixers, list):
            mixers.pop()
        return placed


class RangesTooFar(EveryNth):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(EveryNth.Config):
        period: Annotated[int, Range(2, 100)] = 3


class KnowsTwoLayersOnly(Listed):
    @classmethod
    def place(cls, num_layers, mixers, config):
        if num_layers != 2:
            raise FieldError("names", "two layers only")
        return super().place(num_layers, mixers, config)


class HasNoReference(EveryNth):
    reference = ""


class HoldsInfinity(EveryNth):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(EveryNth.Config):
        limit: float = math.inf


FAULTS: list[tuple[type[Placement], str]] = [
    (PlacesOneTooMany, "test_places_only_what_is_offered"),
    (PlacesTheUnoffered, "test_places_only_what_is_offered"),
    (PlacesAList, "test_places_only_what_is_offered"),
    (PlacesNothing, "test_places_only_what_is_offered"),
    (NamesNoField, "test_places_only_what_is_offered"),
    (Rolls, "test_is_pure"),
    (ConsumesTheOffer, "test_is_pure"),
    (RangesTooFar, "test_search_ranges"),
    (KnowsTwoLayersOnly, "test_search_ranges"),
    (HasNoReference, "test_class_attributes"),
    (HoldsInfinity, "test_config_is_plain_data"),
]

RAISES = {"test_config_is_plain_data": "ValueError"}


@pytest.mark.parametrize(
    ("placement", "test"), FAULTS, ids=[f"{thing.__name__}-{test[5:]}" for thing, test in FAULTS]
)
def test_each_fault_is_found(placement: type[Placement], test: str, tmp_path: Path) -> None:
    message = failure(
        PlacementContract, test, tmp_path, placement=placement, configs=(placement.Config(),)
    )
    assert message.startswith(RAISES.get(test, "AssertionError"))


def test_every_test_of_the_suite_has_a_fault() -> None:
    assert suite_tests(PlacementContract) == {test for _, test in FAULTS}
