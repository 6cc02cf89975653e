"""PresetContract passes on an honest preset, and each of its tests finds its fault."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest

from tests.workbench.testing.running import failure, suite_tests
from workbench.layout import Block, Layout
from workbench.preset import Preset
from workbench.testing import PresetContract
from workbench.testing.toy_layers import ToyMixer
from workbench.testing.toys import toy_builder, toy_layout

GOOD = Preset(layout=toy_layout, source="tests")
_widths = itertools.count(32)


class ToyPresets(PresetContract):
    """The suite, with a builder that knows the toys and one layer that cannot count."""

    configs = (None,)

    def builder(self):
        builder = toy_builder()
        builder.layers.add("miscounted", Miscounted, builder.layers.provenance("toy-mixer"))
        return builder


class Miscounted(ToyMixer):
    @classmethod
    def costs(cls, d_model, config, *, length, bytes_per_element=4):
        exact = super().costs(d_model, config, length=length, bytes_per_element=bytes_per_element)
        return dataclasses.replace(exact, parameters=1, active_parameters=1, own_parameters=1)


class TestToyPreset(ToyPresets):
    preset = GOOD


def of(layer: str, config: dict[str, object] | None = None) -> Preset:
    block = Block(layer=layer, config=config or {})
    return Preset(layout=lambda: Layout(d_model=32, vocab_size=64, blocks=(block,)), source="tests")


FAULTS = [
    ("says_where_it_is_from", dataclasses.replace(GOOD, source=" "), "name the document"),
    ("says_where_it_is_from", dataclasses.replace(GOOD, stated_parameters=""), "use None"),
    ("resolves", of("toy_mixer"), "unknown layer 'toy_mixer'. Did you mean 'toy-mixer'?"),
    ("resolves", of("toy-mixer", {"expands": 2}), "Did you mean 'expand'?"),
    (
        "resolves",
        Preset(layout=lambda: toy_layout().replace(d_model=next(_widths)), source="tests"),
        "two calls, two layouts",
    ),
    ("counts_without_weights", of("miscounted"), "parameters, the model has"),
]


@pytest.mark.parametrize(("check", "preset", "words"), FAULTS)
def test_each_fault_is_found(check: str, preset: Preset, words: str, tmp_path: Path) -> None:
    assert words in failure(ToyPresets, f"test_{check}", tmp_path, preset=preset)


def test_every_test_of_the_suite_has_a_fault() -> None:
    assert suite_tests(PresetContract) == {f"test_{check}" for check, _, _ in FAULTS}
