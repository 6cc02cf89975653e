"""What every contract suite shares: it runs once a Config, and each Config must be plain data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pytest

from workbench import config as configs
from workbench.config import Choice, Field, Mixer, Range
from workbench.errors import FieldError
from workbench.layout import canonical_json


class ConfigContract:
    """Base of the suites: tests with an argument `config` run once for each of `configs`.

    Class attributes:
        under_test: name of the class attribute that holds the thing under test.
    """

    under_test: ClassVar[str]
    configs: ClassVar[Sequence[Any]]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "config" in metafunc.fixturenames:
            if not getattr(self, "configs", ()):
                raise pytest.UsageError(f"{type(self).__qualname__} must set `configs`")
            ids = [describe_config(config) for config in self.configs]
            metafunc.parametrize("config", self.configs, ids=ids)

    def test_config_is_plain_data(self, config: Any) -> None:
        """A Config survives JSON: records, studies and exports hold it as such.

        Mend: Give the Config fields of plain types only (bool, int, float, str, None, tuples of
        them), with finite numbers, and let its `__post_init__` change nothing.
        """
        text = canonical_json(configs.to_dict(config))
        assert configs.from_dict(type(config), json.loads(text)) == config


def describe_config(config: Any) -> str:
    """The fields that differ from their defaults (`num_heads=2,position=alibi`), for test ids."""
    declared = configs.fields_of(type(config))
    changed = [
        f"{name}={getattr(config, name)}"
        for name, field in declared.items()
        if field.required or getattr(config, name) != field.default
    ]
    return ",".join(changed) or "defaults"


def searched_fields(config_class: type) -> list[Field]:
    """The fields that carry a search range."""
    return [field for field in configs.fields_of(config_class).values() if field.domain is not None]


def searched_values(domain: Any, mixers: Sequence[str] = ()) -> Iterator[Any]:
    """Values that a search could draw: ends and middle of a Range, every value of a Choice.

    Args:
        mixers: what a `Mixer` field may name.

    Raises:
        TypeError: the domain has no single value (`PerLayer`).
    """
    match domain:
        case Choice():
            yield from domain.values
        case Range():
            yield from _ends_and_middle(domain)
        case Mixer():
            yield from mixers
        case _:
            raise TypeError(f"{type(domain).__name__} is no domain of one value")


def _ends_and_middle(domain: Range) -> list[float]:
    low, high = domain.low, domain.high
    is_int = isinstance(low, int) and isinstance(high, int)
    step = domain.step or (1 if is_int else None)
    if step is None:
        return [low, (low + high) / 2, high]
    steps = int((high - low) / step + 1e-9)
    return list(dict.fromkeys(low + count * step for count in (0, steps // 2, steps)))


def with_value(config: Any, field: Field, value: Any) -> Any:
    """`config` with one field set as a study would set it, or the FieldError that refuses it."""
    configs.coerce(value, field.type, field.name)
    try:
        return dataclasses.replace(config, **{field.name: value})
    except FieldError as error:
        return error


def names_a_field(error: FieldError, config_class: type, *others: str) -> bool:
    """Whether the error's field is one of the Config's (or of `others`)."""
    root = error.field.partition(".")[0].partition("[")[0]
    return root in configs.fields_of(config_class) or root in others
