"""Layouts at other sizes: exact counts against built models, ratios, placement, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from workbench.builder import Builder, default_builder
from workbench.errors import FieldError, WorkbenchError
from workbench.layout import Block, Layout, Named
from workbench.scaling import Scaled, parse_count, scale
from workbench.scaling_pattern import Pattern
from workbench.scaling_placement import Placer, Policy
from workbench.scaling_width import widened

PLUGINS = Path(__file__).parents[2] / "plugins"


@pytest.fixture(scope="module")
def builder() -> Builder:
    return default_builder()


def layout_of(names: list[str], **changes: Any) -> Layout:
    configs: dict[str, dict[str, Any]] = {
        "attention": {"head_dim": 32, "num_kv_heads": 1},
        KV: {"head_dim": 32, "num_kv_heads": 1},
        "mamba2": {"d_state": 16, "headdim": 32},
        "swiglu": {"expand": 2.0},
    }
    int8 = Named(name="int8")
    blocks = tuple(
        Block(layer=name, config=dict(configs.get(name, {})), quantizer=int8) for name in names
    )
    return Layout(**{"d_model": 64, "vocab_size": 256, "blocks": blocks, **changes})


KV = "kv-sharing-attention"
HYBRID = ["mamba2", "swiglu", "mamba2", "swiglu", "attention", "swiglu"]


def scaled(builder: Builder, layout: Layout, target: int, **options: Any) -> Scaled:
    layout = builder.resolve(layout)
    pattern = Pattern.of(layout.blocks, lambda name: builder.layers[name].kind == "mlp")
    return scale(builder, layout, Placer(pattern), target, **options)


@pytest.mark.parametrize(
    ("target", "vocab_size"),
    [
        (10_000_000, 256), (20_000_000, 32_000), (350_000_000, 256), (350_000_000, 32_000),
        (1_300_000_000, 256), (1_300_000_000, 128_000),
    ],
)  # fmt: skip
def test_targets_are_hit_and_counted_as_a_built_model_counts(
    builder: Builder, target: int, vocab_size: int
) -> None:
    result = scaled(builder, layout_of(HYBRID, vocab_size=vocab_size), target)
    assert abs(result.error) <= 0.02
    model = builder.build(result.layout, device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == result.parameters
    assert result.layout.vocab_size == vocab_size


def test_small_targets_are_hit_with_finer_widths(builder: Builder) -> None:
    plain = layout_of(["mamba", "swiglu"])
    for target in (1_000_000, 2_000_000, 3_000_000, 5_000_000):
        result = scaled(builder, plain, target)
        assert result.is_close
        assert result.layout.d_model % 16 == 0


def test_head_dims_states_and_quantizers_stay_and_fixed_heads_grow(builder: Builder) -> None:
    result = scaled(builder, layout_of(HYBRID), 20_000_000)
    ratio = result.layout.d_model / 64
    for block in result.layout.blocks:
        assert block.quantizer is not None
        assert block.quantizer.name == "int8"
        if block.layer == "attention":
            assert block.config["head_dim"] == 32
            assert block.config["num_kv_heads"] == ratio  # one in two heads, as before
        if block.layer == "mamba2":
            assert (block.config["headdim"], block.config["d_state"]) == (32, 16)
    names = [block.layer for block in result.layout.blocks]
    mixers = names[::2]
    assert set(names[1::2]) == {"swiglu"}
    assert abs(mixers.count("attention") - len(mixers) / 3) <= 1
    assert mixers == sorted(mixers, reverse=True)  # mamba2 below, attention above


def test_the_same_size_gives_the_same_layout(builder: Builder) -> None:
    layout = builder.resolve(layout_of(HYBRID))
    own = builder.costs(layout, length=1).total.parameters
    assert scaled(builder, layout, own, d_model=64).layout == layout
    assert scaled(builder, layout, own, num_layers=3).layout == layout


@pytest.mark.parametrize("target", [20_000_000, 1_300_000_000])
def test_the_aspect_is_near_the_originals_within_its_bounds(builder: Builder, target: int) -> None:
    narrow = scaled(builder, layout_of(HYBRID), target)  # 64 over 3 layers: raised to 32
    wide = scaled(builder, layout_of(HYBRID, d_model=256), target)  # 85, within the bounds
    assert (narrow.aspect, wide.aspect) == (32, 256 / 3)
    for result in (narrow, wide):
        aspect = result.layout.d_model / result.num_layers
        assert result.aspect / 2 < aspect < result.aspect * 2
    assert wide.layout.d_model > narrow.layout.d_model


def test_depth_or_width_can_be_fixed(builder: Builder) -> None:
    deep = scaled(builder, layout_of(HYBRID), 100_000_000, num_layers=40)
    assert deep.num_layers == 40
    assert len(deep.layout.blocks) == 80
    wide = scaled(builder, layout_of(HYBRID), 100_000_000, d_model=384)
    assert wide.layout.d_model == 384
    assert wide.is_close


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        (1000, {}, "--params: 1.000 k is smaller than can be built: d_model 64"),
        (10**15, {}, "--params: 1.000 P cannot be reached"),
        (10**9, {"d_model": 64}, "--d-model: too narrow for 1.000 G"),
        (10**6, {"d_model": 4096}, "--d-model: too wide for 1.000 M"),
        (10**6, {"num_layers": 500}, "--depth: too many for 1.000 M"),
        (10**12, {"num_layers": 2}, "--depth: 1.000 T cannot be reached"),
        (10**6, {"num_layers": 1}, "--depth: must be from 2 "),
        (10**6, {"d_model": 0}, "--d-model: must be from 1 "),
        (10**6, {"d_model": 64, "num_layers": 2}, "--depth: leave it or --d-model free"),
        (10**6, {"d_model": 100}, "no model with d_model = 100 can be built: "),
    ],
)
def test_what_cannot_be_reached_is_refused(
    builder: Builder, target: int, options: dict[str, int], words: str
) -> None:
    with pytest.raises(WorkbenchError) as error:
        scaled(builder, layout_of(HYBRID), target, **options)
    assert str(error.value).startswith(words)


@pytest.mark.parametrize("attention", [0, 5, 11])
def test_a_smaller_model_loses_no_kind_of_layer(builder: Builder, attention: int) -> None:
    layout = one_attention(attention, num_kv_heads=8)
    result = scaled(builder, layout, 400_000)
    assert {block.layer for block in result.layout.blocks} == {"mamba2", "attention"}
    assert result.is_close
    with pytest.raises(FieldError, match=r"--depth: .*fewer would lose a kind of layer.*got 2"):
        scaled(builder, layout, 400_000, num_layers=2)


def one_attention(index: int, **config: int) -> Layout:
    layout = layout_of(["mamba2"] * 12, d_model=256)
    attention = Block(layer="attention", config={"head_dim": 32, **config})
    return layout.replace(blocks=(*layout.blocks[:index], attention, *layout.blocks[index + 1 :]))


def test_what_no_width_reaches_is_too_small_and_no_near_miss(builder: Builder) -> None:
    """One key and value head at 256 is none at 128: 256 is the least width."""
    with pytest.raises(FieldError, match="is smaller than can be built: d_model 256 with"):
        scaled(builder, one_attention(3, num_kv_heads=1), 200_000)


def test_a_near_miss_is_returned_and_says_how_near(builder: Builder) -> None:
    result = scaled(builder, layout_of(HYBRID), 2_000_000, num_layers=3)
    assert not result.is_close
    assert result.error == result.parameters / 2_000_000 - 1
    assert abs(result.error) < 0.5


@pytest.mark.parametrize(
    ("text", "number"),
    [("1.3B", 1_300_000_000), ("350M", 350_000_000), ("2_000_000", 2_000_000), ("1e9", 10**9),
     ("7b", 7 * 10**9), ("12k", 12_000), ("1.5T", 1_500_000_000_000)],
)  # fmt: skip
def test_counts_are_read(text: str, number: int) -> None:
    assert parse_count(text) == number


@pytest.mark.parametrize(
    "text",
    ["1.3X", "", "-5M", "B", "1,3B", "0", "0.1", "nan", "1e999", "inf", "9" * 400, "٣M"],
)
def test_bad_counts_are_refused(text: str) -> None:
    with pytest.raises(FieldError, match="--params"):
        parse_count(text)


def test_widths_that_a_config_fixes_grow_by_its_names() -> None:
    block = Block(
        layer="any",
        config={
            "num_heads": 2, "num_kv_heads": 1, "num_experts": 8, "head_dim": 32, "d_state": 16,
            "intermediate_size": 96, "dt_rank": 5, "bias": True, "expand": 2.0, "position": "rope",
        },
    )  # fmt: skip
    assert widened(block, 64, 96 + 32).config == {
        "num_heads": 4, "num_kv_heads": 2, "num_experts": 8, "head_dim": 32, "d_state": 16,
        "intermediate_size": 192, "dt_rank": 10, "bias": True, "expand": 2.0, "position": "rope",
    }  # fmt: skip
    with pytest.raises(FieldError, match="num_kv_heads: 1 heads"):
        widened(Block(layer="any", config={"num_kv_heads": 1}), 64, 96)


def policy(builder: Builder, name: str, kinds: str, **values: Any) -> Policy:
    """A policy as a trial has it whose mixers are `m` and `a`."""
    mixers = {"m": "mamba2", "a": "attention"}
    blocks = [Block(layer=mixers[kind]) for kind in kinds]
    pattern = Pattern.of(blocks, lambda name: False)
    of = [layer[0].layer for layer in pattern.layers]
    given = {"majority": "mamba2", "minority": "attention", **values}
    return Policy(name, builder.placements[name], given, of, pattern, of)


@pytest.mark.parametrize(
    ("name", "kinds", "values", "depth", "expected"),
    [
        ("periodic", "mamm", {"period": 4, "offset": 1}, 12, "mammmammmamm"),
        ("prefix_suffix", "mma", {"ratio": 2}, 9, "mmmmmmaaa"),
        ("evenly_spaced", "mmam", {"count": 1}, 12, None),
        ("sandwich", "amma", {"depth": 1}, 12, "aaammmmmmaaa"),
    ],
)
def test_policies_place_at_the_new_depth(
    builder: Builder,
    name: str,
    kinds: str,
    values: dict[str, int],
    depth: int,
    expected: str | None,
) -> None:
    made = policy(builder, name, kinds, **values)
    assert made.explains
    placed = made.place(depth)
    assert placed is not None
    letters = list(dict.fromkeys(kinds))
    text = "".join(letters[kind] for kind in placed[0])
    wanted = kinds.count("a") * depth / len(kinds)
    assert abs(text.count("a") - wanted) <= 1
    if expected is not None:
        assert text == expected


@pytest.mark.parametrize("depth", [2, 3, 5, 8, 12, 31])
@pytest.mark.parametrize(
    ("name", "kinds", "values"),
    [
        ("periodic", "mammmamm", {"period": 4, "offset": 1}),
        ("prefix_suffix", "mmmmaa", {"ratio": 2}),
        ("sandwich", "aammmmaa", {"depth": 2}),
    ],
)
def test_different_layers_of_a_mixer_fill_the_places_of_its_policy(
    builder: Builder, name: str, kinds: str, values: dict[str, int], depth: int
) -> None:
    """As blocks have them that chose on their own: in their order, each by its share."""
    plain = policy(builder, name, kinds, **values)
    mixers = [{"m": "mamba2", "a": "attention"}[kind] for kind in kinds]
    blocks = [Block(layer=mixer, config={"own": i}) for i, mixer in enumerate(mixers)]
    pattern = Pattern.of(blocks, lambda name: False)
    assert len(set(pattern.kinds)) == len(kinds)
    made = Policy(name, builder.placements[name], plain._values, plain._mixers, pattern, mixers)
    assert made.explains
    alike, own = plain.place(depth), made.place(depth)
    if alike is None:
        assert own is None
        return
    assert own is not None
    names = list(dict.fromkeys(mixers))
    assert [mixers[kind] for kind in own[0]] == [names[kind] for kind in alike[0]]
    assert own[1] == f"{alike[1]}, each mixer's different layers in their order"
    for mixer in names:
        filled = [kind for kind in own[0] if mixers[kind] == mixer]
        assert filled == sorted(filled)
        counts = [filled.count(kind) for kind in range(len(kinds)) if mixers[kind] == mixer]
        assert max(counts) - min(counts) <= 1
    assert made.place(len(kinds)) == (pattern.kinds, made.place(len(kinds))[1])


def test_a_policy_that_does_not_explain_the_trial_is_known(builder: Builder) -> None:
    assert not policy(builder, "sandwich", "mama", depth=1).explains


@pytest.mark.parametrize("folder", ["shared-attention", "kv-sharing", "moe"])
def test_linked_blocks_and_experts_are_carried_over(folder: str) -> None:
    """Weights that blocks share count once, as in a built model; sources are found again."""
    builder = default_builder((str(PLUGINS / folder),))
    names = {
        "shared-attention": ["mamba2", "shared-attention", "mamba2", "shared-attention"],
        "kv-sharing": ["attention", KV, KV],
        "moe": ["mamba2", "moe"],
    }[folder]
    result = scaled(builder, layout_of(names), 20_000_000)
    assert result.is_close
    model = builder.build(result.layout, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == result.parameters
    sources = builder.sources(result.layout)
    assert any(source is not None for source in sources) == (folder != "moe")
    total = builder.costs(result.layout, length=1).total
    assert total.active_parameters is not None
    assert (total.active_parameters < result.parameters) == (folder == "moe")


MEMORY = """
import json, resource, sys
from workbench.builder import default_builder
from workbench.layout import Layout
from workbench.scaling import scale
from workbench.scaling_pattern import Pattern
from workbench.scaling_placement import Placer

builder = default_builder()
layout = builder.resolve(Layout.from_json(sys.stdin.read()))
builder.costs(layout, length=2048)
pattern = Pattern.of(layout.blocks, lambda name: builder.layers[name].kind == "mlp")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = scale(builder, layout, Placer(pattern), 1_300_000_000)
costs = builder.costs(result.layout, length=2048, bytes_per_element=2)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([costs.weight_bytes, (after - before) * 1024]))
"""


def test_scaling_to_a_billion_allocates_nothing() -> None:
    """Peak memory of a process of its own; quantized weights are counted on the meta device."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY],
        input=layout_of(HYBRID).to_json(),
        capture_output=True,
        text=True,
        check=True,
    )
    weights, grown = json.loads(done.stdout)
    assert weights > 10**9
    assert grown < 100 * 2**20
