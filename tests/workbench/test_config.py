"""Configs: every value checked against its declared type, and the same after JSON."""

from __future__ import annotations

import dataclasses
import gc
import json
import weakref
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.config import (
    Choice,
    Mixer,
    NoConfig,
    PerLayer,
    Range,
    coerce,
    fields_of,
    from_dict,
    to_dict,
)
from workbench.errors import FieldError, UnknownNameError
from workbench.testing.configs import searched_values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Everything:
    width: int
    rate: Annotated[float, Range(0.0, 0.3), "share of what is dropped"] = 0.1
    bias: Annotated[bool, Choice(False, True)] = False
    name: str = "x"
    window: int | None = None
    position: Literal["rope", "none"] = "rope"
    sizes: tuple[int, ...] = ()
    pair: tuple[int, str] = (1, "a")
    either: float | int | str = 0
    lists: tuple[tuple[int, ...], ...] = ()
    mixers: Annotated[tuple[str, ...], PerLayer(Mixer("attention")), "one a layer"] = ()

    def __post_init__(self) -> None:
        if self.width < 1:
            raise FieldError("width", f"must be at least 1, got {self.width}")


numbers = st.floats(allow_nan=False, allow_infinity=False)
ints = st.integers(-(2**53), 2**53)
everything = st.builds(
    Everything,
    width=st.integers(1, 2**40),
    rate=numbers,
    bias=st.booleans(),
    name=st.text(),
    window=st.none() | ints,
    position=st.sampled_from(["rope", "none"]),
    sizes=st.lists(ints).map(tuple),
    pair=st.tuples(ints, st.text()),
    either=numbers | ints | st.text(),
    lists=st.lists(st.lists(ints).map(tuple)).map(tuple),
    mixers=st.lists(st.text()).map(tuple),
)


@settings(derandomize=True, deadline=None)
@given(everything)
def test_json_round_trip(config: Everything) -> None:
    back = from_dict(Everything, json.loads(json.dumps(to_dict(config), allow_nan=False)))
    assert back == config
    for field in dataclasses.fields(config):
        assert type(getattr(back, field.name)) is type(getattr(config, field.name)), field.name


def test_declared_fields() -> None:
    declared = fields_of(Everything)
    assert list(declared) == [field.name for field in dataclasses.fields(Everything)]
    assert declared["width"].required
    assert declared["rate"].domain == Range(0.0, 0.3)
    assert declared["rate"].label == "share of what is dropped"
    assert declared["rate"].type is float
    assert declared["bias"].label == ""
    assert declared["name"].domain is None
    assert declared["mixers"].domain == PerLayer(Mixer("attention"))
    assert fields_of(NoConfig) == {}


def test_what_is_declared_is_read_once_and_cannot_be_spoilt() -> None:
    declared = fields_of(Everything)
    assert all(again is declared[name] for name, again in fields_of(Everything).items())
    declared.clear()
    assert fields_of(Everything)["width"].required


def test_a_config_class_that_nobody_needs_any_more_goes() -> None:
    """A dashboard loads plugins anew for days."""
    config = dataclasses.make_dataclass("Gone", [("width", int, 1)], frozen=True)
    assert fields_of(config)["width"].default == 1
    gone = weakref.ref(config)
    del config
    gc.collect()
    assert gone() is None


def test_defaults_are_filled_in_and_factories_called() -> None:
    @dataclasses.dataclass(frozen=True)
    class WithFactory:
        sizes: tuple[int, ...] = dataclasses.field(default_factory=lambda: (1, 2))

    assert from_dict(Everything, {"width": 3}) == Everything(width=3)
    assert fields_of(WithFactory)["sizes"].default == (1, 2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "width: is required"),
        ({"width": 0}, "width: must be at least 1, got 0"),
        ({"width": "3"}, "width: expected int, got '3'"),
        ({"width": 3.0}, "width: expected int, got 3.0"),
        ({"width": True}, "width: expected int, got True"),
        ({"width": None}, "width: expected int, got None"),
        ({"rate": "high"}, "rate: expected float, got 'high'"),
        ({"rate": True}, "rate: expected float, got True"),
        ({"rate": float("nan")}, "rate: must be a finite number, got nan"),
        ({"rate": float("-inf")}, "rate: must be a finite number, got -inf"),
        ({"rate": 10**400}, "rate: must be a finite number, got 1000"),
        ({"bias": 1}, "bias: expected bool, got 1"),
        ({"name": 3}, "name: expected str, got 3"),
        ({"window": "all"}, "window: expected int or null, got 'all'"),
        ({"window": False}, "window: expected int or null, got False"),
        ({"position": "alibi"}, "position: 'alibi' is none of ['rope', 'none']"),
        ({"position": ["rope"]}, "position: ['rope'] is none of"),
        ({"sizes": 3}, "sizes: expected tuple[int, ...], got 3"),
        ({"sizes": [1, "2"]}, "sizes[1]: expected int, got '2'"),
        ({"pair": [1]}, "pair: expected 2 values, got 1"),
        ({"pair": ["a", 1]}, "pair[0]: expected int, got 'a'"),
        ({"lists": [[1], [2, None]]}, "lists[1][1]: expected int, got None"),
        ({"either": None}, "either: expected float or int or str, got None"),
    ],
)
def test_wrong_values_name_their_field(data: dict[str, Any], message: str) -> None:
    if message != "width: is required":
        data = {"width": 3, **data}
    with pytest.raises(FieldError) as caught:
        from_dict(Everything, data)
    assert str(caught.value).startswith(message)
    assert message.startswith(caught.value.field)


def test_an_unknown_field_is_met_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown field 'witdh'\. Did you mean 'width'"):
        from_dict(Everything, {"witdh": 3})


@pytest.mark.parametrize(
    ("value", "expected", "result"),
    [
        (3, float, 3.0),
        (3, float | int, 3),
        (3, int | float, 3),
        (3, float | None, 3.0),
        (3.5, int | float, 3.5),
        (None, int | None, None),
        ([1, 2], tuple[int, ...], (1, 2)),
        ((1, 2), tuple[float, ...], (1.0, 2.0)),
        (["a"], int | tuple[str, ...], ("a",)),
        (1, Literal[1, 2], 1),
    ],
)
def test_coerce(value: Any, expected: Any, result: Any) -> None:
    actual = coerce(value, expected, "field")
    assert actual == result
    assert type(actual) is type(result)


@pytest.mark.parametrize(("value", "expected"), [(True, Literal[1, 2]), (1.0, Literal[1, 2])])
def test_literals_do_not_take_what_only_compares_equal(value: Any, expected: Any) -> None:
    with pytest.raises(FieldError, match="is none of"):
        coerce(value, expected, "field")


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Range(2, 1), "low"),
        (lambda: Range(0, 1, step=0), "step"),
        (lambda: Range(0, 1, log=True), "log"),
        (lambda: Range(1, 2, step=1, log=True), "log"),
        (lambda: Choice(), "values"),
        (lambda: Choice(1, 2, 1), "values"),
    ],
)
def test_impossible_ranges_are_refused(make: Any, field: str) -> None:
    with pytest.raises(FieldError) as caught:
        make()
    assert caught.value.field == field


def test_a_choice_may_hold_values_that_compare_equal() -> None:
    assert Choice(1, True, 1.0, None).values == (1, True, 1.0, None)


@pytest.mark.parametrize(
    ("domain", "values"),
    [
        (Range(1, 8), [1, 4, 8]),
        (Range(3, 3), [3]),
        (Range(16, 64, step=16), [16, 32, 64]),
        (Range(1, 8, step=2), [1, 3, 7]),
        (Range(0.0, 0.3), [0.0, 0.15, 0.3]),
        (Range(0.0, 0.3, step=0.1), [0.0, 0.1, 3 * 0.1]),
        (Choice("a", None), ["a", None]),
        (Mixer(), ["m", "n"]),
    ],
)
def test_the_suites_probe_values_inside_their_domain(domain: Any, values: list[Any]) -> None:
    probed = list(searched_values(domain, ("m", "n")))
    assert probed == values
    assert [type(value) for value in probed] == [type(value) for value in values]


def test_only_frozen_dataclasses_are_configs() -> None:
    @dataclasses.dataclass
    class Thawed:
        width: int = 1

    with pytest.raises(TypeError, match="Thawed must be frozen"):
        fields_of(Thawed)
    with pytest.raises(TypeError, match="must be a dataclass"):
        fields_of(dict)
