"""Placement policies: properties at every depth from 1 to 48, then examples worked by hand."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
from transformers import JambaConfig

from workbench import config as configs
from workbench.builder import Builder
from workbench.errors import FieldError
from workbench.placement import Placement
from workbench_placement.common import spread
from workbench_placement.explicit import Free, Pattern, Uniform, expand
from workbench_placement.mixed import EvenlySpaced, Periodic, PrefixSuffix, Sandwich, Strategic

MIXERS = ("mamba", "mamba2", "attention")
DEPTHS = range(1, 49)

# Configs whose refusals and counts are checked at every depth.
MIXED: list[tuple[type[Placement], dict[str, int]]] = [
    (Periodic, {"period": 1, "offset": 0}),
    (Periodic, {"period": 2, "offset": 1}),
    (Periodic, {"period": 8, "offset": 4}),
    (Periodic, {"period": 48, "offset": 47}),
    (EvenlySpaced, {"count": 1}),
    (EvenlySpaced, {"count": 5}),
    (EvenlySpaced, {"count": 48}),
    (PrefixSuffix, {"ratio": 1}),
    (PrefixSuffix, {"ratio": 2}),
    (PrefixSuffix, {"ratio": 7}),
    (Sandwich, {"depth": 1}),
    (Sandwich, {"depth": 6}),
    (Strategic, {"early": 2, "middle": 2, "top": 3}),
    (Strategic, {"early": 1, "middle": 9, "top": 2}),
    (Strategic, {"early": 0, "middle": 3, "top": 0}),
]


def minority_layers(policy: type[Placement], values: dict[str, int], num_layers: int) -> int:
    """How many attention layers a mixed policy owes; 0 where it must refuse."""
    if policy is Periodic:
        return sum(index % values["period"] == values["offset"] for index in range(num_layers))
    if policy is PrefixSuffix:
        return num_layers // (values["ratio"] + 1)
    if policy is Sandwich:
        return 2 * values["depth"] if num_layers > 2 * values["depth"] else 0
    total = sum(values.values())
    return total if num_layers >= total else 0


def place(policy: type[Placement], num_layers: int, **values: Any) -> tuple[str, ...]:
    """A placement from plain data; the mixed policies put attention among Mamba."""
    if "majority" in configs.fields_of(policy.Config):
        values = {"majority": "mamba", "minority": "attention", **values}
    config: Any = configs.from_dict(policy.Config, values)
    return policy.place(num_layers, MIXERS, config)


def glyphs(names: tuple[str, ...]) -> str:
    return "".join({"mamba": "M", "mamba2": "2", "attention": "A"}[name] for name in names)


@pytest.mark.parametrize(("policy", "values"), MIXED)
def test_mixed_policies_place_the_promised_count_or_refuse(
    policy: type[Placement], values: dict[str, int]
) -> None:
    for num_layers in DEPTHS:
        owed = minority_layers(policy, values, num_layers)
        if owed == 0:
            with pytest.raises(FieldError) as refusal:
                place(policy, num_layers, **values)
            assert refusal.value.field in values
            continue
        placed = place(policy, num_layers, **values)
        assert len(placed) == num_layers
        assert placed.count("attention") == owed
        assert placed.count("mamba") == num_layers - owed
        assert placed == place(policy, num_layers, **values)


@pytest.mark.parametrize("policy", [Periodic, EvenlySpaced, PrefixSuffix, Sandwich, Strategic])
def test_mixed_policies_place_only_what_they_are_told(policy: type[Placement]) -> None:
    placed = place(policy, 12, majority="mamba2", minority="mamba")
    assert set(placed) == {"mamba2", "mamba"}


@pytest.mark.parametrize("field", ["majority", "minority"])
@pytest.mark.parametrize("policy", [Periodic, EvenlySpaced, PrefixSuffix, Sandwich, Strategic])
def test_a_mixer_that_is_not_offered_is_refused(policy: type[Placement], field: str) -> None:
    with pytest.raises(FieldError, match=r"'hyena' is not offered.*mamba, mamba2, attention") as no:
        place(policy, 12, **{field: "hyena"})
    assert no.value.field == field


@pytest.mark.parametrize(("period", "offset"), [(8, 4), (8, 0), (2, 1), (5, 3), (3, 2), (7, 6)])
def test_periodic_is_jambas(period: int, offset: int) -> None:
    for num_layers in range(offset + 1, 49):
        jamba = JambaConfig(
            num_hidden_layers=num_layers, attn_layer_period=period, attn_layer_offset=offset
        )
        placed = place(Periodic, num_layers, period=period, offset=offset)
        assert list(placed) == jamba.layers_block_type


def test_spread_is_even_and_symmetric() -> None:
    for width in DEPTHS:
        for count in range(1, width + 1):
            indices = spread(count, 0, width)
            gaps = {after - before for before, after in pairwise(indices)}
            assert not gaps or max(gaps) - min(gaps) <= 1
            before, after = indices[0], width - 1 - indices[-1]
            assert 0 <= before - after <= 1
            assert indices == [index - 5 for index in spread(count, 5, 5 + width)]


@pytest.mark.parametrize(
    ("policy", "num_layers", "values", "expected"),
    [
        (Periodic, 8, {}, "MMMMAMMM"),
        (Periodic, 7, {"period": 3, "offset": 1}, "MAMMAMM"),
        (EvenlySpaced, 12, {"count": 3}, "MMAMMMAMMMAM"),
        (EvenlySpaced, 5, {"count": 1}, "MMAMM"),
        (EvenlySpaced, 7, {"count": 2}, "MAMMMAM"),
        (PrefixSuffix, 12, {}, "MMMMMMMMAAAA"),
        (PrefixSuffix, 11, {}, "MMMMMMMMAAA"),
        (PrefixSuffix, 4, {"ratio": 1}, "MMAA"),
        (Strategic, 12, {}, "AAMAMMMAMAAA"),
        (Strategic, 6, {"early": 1, "middle": 1, "top": 2}, "AMAMAA"),
        (Strategic, 7, {}, "AAAAAAA"),
        (Sandwich, 6, {}, "AMMMMA"),
        (Sandwich, 5, {"depth": 2}, "AAMAA"),
        (Uniform, 3, {"mixer": "mamba2"}, "222"),
        (Pattern, 7, {"pattern": "mamba, mamba2,attention"}, "M2AM2AM"),
        (Pattern, 8, {"pattern": "3*mamba, attention"}, "MMMAMMMA"),
        (Free, 4, {"mixers": ["mamba", "attention", "mamba2", "mamba"]}, "MA2M"),
    ],
)
def test_examples(
    policy: type[Placement], num_layers: int, values: dict[str, Any], expected: str
) -> None:
    assert glyphs(place(policy, num_layers, **values)) == expected


def test_prefix_suffix_gives_the_documents_two_sizes() -> None:
    tiny, small = place(PrefixSuffix, 12), place(PrefixSuffix, 24)
    assert (tiny.count("mamba"), tiny.count("attention")) == (8, 4)
    assert (small.count("mamba"), small.count("attention")) == (16, 8)
    assert list(small) == sorted(small, reverse=True)


@pytest.mark.parametrize(
    ("policy", "values", "field"),
    [
        (Periodic, {"period": 4, "offset": 4}, "offset"),
        (Periodic, {"period": 0}, "period"),
        (Periodic, {"offset": -1}, "offset"),
        (EvenlySpaced, {"count": 0}, "count"),
        (EvenlySpaced, {"count": 13}, "count"),
        (PrefixSuffix, {"ratio": 0}, "ratio"),
        (PrefixSuffix, {"ratio": 12}, "ratio"),
        (Strategic, {"early": -1}, "early"),
        (Strategic, {"middle": 8}, "middle"),
        (Strategic, {"early": 9, "top": 4}, "top"),
        (Sandwich, {"depth": 0}, "depth"),
        (Sandwich, {"depth": 6}, "depth"),
        (Uniform, {"mixer": "hyena"}, "mixer"),
        (Pattern, {"pattern": "mamba, hyena"}, "pattern"),
        (Pattern, {"pattern": "13*mamba"}, "pattern"),
        (Pattern, {"pattern": "mamba,,attention"}, "pattern"),
        (Pattern, {"pattern": "0*mamba"}, "pattern"),
        (Pattern, {"pattern": "mamba*3"}, "pattern"),
        (Pattern, {"pattern": ""}, "pattern"),
        (Free, {"mixers": ["mamba"]}, "mixers"),
        (Free, {"mixers": ["hyena"] * 12}, "mixers"),
    ],
)
def test_what_cannot_be_placed_in_twelve_layers_names_its_field(
    policy: type[Placement], values: dict[str, Any], field: str
) -> None:
    with pytest.raises(FieldError) as refusal:
        place(policy, 12, **values)
    assert refusal.value.field == field


def test_uniform_pattern_and_free_at_every_depth() -> None:
    for num_layers in DEPTHS:
        assert place(Uniform, num_layers, mixer="mamba") == ("mamba",) * num_layers
        names = [MIXERS[index % 3] for index in range(num_layers)]
        assert place(Free, num_layers, mixers=names) == tuple(names)
        if num_layers >= 3:
            assert place(Pattern, num_layers, pattern=",".join(MIXERS)) == tuple(names)


def test_expand_repeats() -> None:
    assert expand("2*mamba,attention , 1*mamba2") == ["mamba", "mamba", "attention", "mamba2"]


def test_every_policy_is_registered_and_says_what_to_search(builder: Builder) -> None:
    names = {
        name
        for name in builder.placements
        if builder.placements.provenance(name).plugin == "placement"
    }
    assert names == {
        "evenly_spaced", "free", "pattern", "periodic",
        "prefix_suffix", "sandwich", "strategic", "uniform",
    }  # fmt: skip
    for name in names:
        policy = builder.placements[name]
        assert policy.reference
        for field in configs.fields_of(policy.Config).values():
            assert field.label
            assert field.domain is not None or (name, field.name) == ("pattern", "pattern")


def test_no_torch() -> None:
    code = (
        "import sys, workbench_placement; assert not {'torch', 'optuna', 'pandas'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
