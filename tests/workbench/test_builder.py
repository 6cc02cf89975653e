"""The builder: names and defaults resolved, seeded weights, exact costs, nothing allocated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.workbench.plugin_files import builder_of, only_these, write_plugin
from workbench.builder import Builder
from workbench.costs import Costs
from workbench.errors import FieldError, UnknownNameError
from workbench.layout import Block, Layout, Named
from workbench.quantizer import num_bytes
from workbench.testing.allocations import Allocations
from workbench.testing.toys import ToyMixer, ToyMLP, toy_builder, toy_layout

PLUGIN = """
import torch
from torch import nn
from typing import Annotated
from workbench import Choice, FieldError, QuantizationReport, Quantizer

class Heads(Layer):
    @dataclass(frozen=True, kw_only=True)
    class Config:
        num_heads: Annotated[int, Choice(2, 4), "heads"] = 4
        widths: tuple[int, ...] = (1, 2)

    glyph = "h"

    def __init__(self, d_model, config, **factory):
        super().__init__(d_model, config)
        self.proj = nn.Linear(d_model, 3 * d_model, **factory)

    @classmethod
    def check(cls, d_model, config):
        if d_model % config.num_heads:
            raise FieldError("num_heads", f"{config.num_heads} must divide d_model = {d_model}")

    @classmethod
    def costs(cls, d_model, config, *, length, bytes_per_element=4):
        return Costs(parameters=3 * d_model * (d_model + 1), state_bytes=length)

    def forward(self, x_BTD, context=None, state=None):
        return self.proj(x_BTD)[..., : self.d_model]

class HalfLinear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().half())

class Half(Quantizer):
    @dataclass(frozen=True, kw_only=True)
    class Config:
        group_size: int = 8

    @classmethod
    def quantize(cls, layer, config):
        layer.proj = HalfLinear(layer.proj)
        return QuantizationReport(quantized={"proj": layer.proj.weight.nbytes}, kept={})

@hookimpl
def register_layers(register):
    register("heads", Heads)

@hookimpl
def register_quantizers(register):
    register("half", Half)
"""


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    folder = tmp_path_factory.mktemp("plugins")
    write_plugin(folder, "heads", PLUGIN)
    return builder_of(folder)


def layout_of(*blocks: Block, **changes: object) -> Layout:
    return Layout(d_model=16, vocab_size=32, blocks=blocks).replace(**changes)


def test_resolve_writes_every_default_out(builder: Builder) -> None:
    short = layout_of(
        Block(layer="heads", config={"num_heads": 2}, quantizer=Named(name="half")),
        Block(layer="heads"),
    )
    resolved = builder.resolve(short)
    assert resolved.to_dict()["blocks"] == [
        {
            "layer": "heads",
            "config": {"num_heads": 2, "widths": [1, 2]},
            "quantizer": {"name": "half", "config": {"group_size": 8}},
        },
        {"layer": "heads", "config": {"num_heads": 4, "widths": [1, 2]}},
    ]
    assert builder.resolve(resolved) == resolved
    assert Layout.from_json(resolved.to_json()) == resolved


def test_resolve_gives_one_hash_to_one_model(builder: Builder) -> None:
    """However much of it was written out."""
    short = layout_of(Block(layer="heads"))
    long = layout_of(Block(layer="heads", config={"widths": [1, 2], "num_heads": 4}))
    assert short.hash != long.hash
    assert builder.resolve(short).hash == builder.resolve(long).hash


@pytest.mark.parametrize(
    ("block", "field", "message"),
    [
        (
            Block(layer="heads", config={"num_heads": 3}),
            "blocks[1] (heads).num_heads",
            "3 must divide d_model = 16",
        ),
        (
            Block(layer="heads", config={"num_heads": "2"}),
            "blocks[1] (heads).num_heads",
            "expected int, got '2'",
        ),
        (
            Block(layer="heads", config={"widths": [1, None]}),
            "blocks[1] (heads).widths[1]",
            "expected int, got None",
        ),
        (
            Block(layer="heads", quantizer=Named(name="half", config={"group_size": 0.5})),
            "blocks[1] (heads).quantizer.group_size",
            "expected int, got 0.5",
        ),
    ],
)
def test_a_field_error_says_which_block(
    builder: Builder, block: Block, field: str, message: str
) -> None:
    layout = layout_of(Block(layer="heads"), block)
    for use in (builder.resolve, builder.build):
        with pytest.raises(FieldError) as caught:
            use(layout)
        assert caught.value.field == field
        assert caught.value.message == message


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Block(layer="head"), "unknown layer 'head'. Did you mean 'heads'?"),
        (
            Block(layer="heads", quantizer=Named(name="halve")),
            "unknown quantizer 'halve'. Did you mean 'half'?",
        ),
        (
            Block(layer="heads", config={"num_head": 2}),
            "unknown field of blocks[1] (heads) 'num_head'. Did you mean 'num_heads'?",
        ),
        (
            Block(layer="heads", quantizer=Named(name="half", config={"group": 2})),
            "unknown field of blocks[1] (heads).quantizer 'group'. Did you mean 'group_size'?",
        ),
    ],
)
def test_an_unknown_name_is_met_with_the_nearest(
    builder: Builder, block: Block, message: str
) -> None:
    with pytest.raises(UnknownNameError) as caught:
        builder.resolve(layout_of(Block(layer="heads"), block))
    assert str(caught.value).startswith(message)


def test_an_unknown_layer_mentions_the_plugin_that_did_not_load(tmp_path: Path) -> None:
    write_plugin(tmp_path, "broken", "import no_such_module")
    with pytest.raises(UnknownNameError, match="Plugin 'broken' did not load") as caught:
        builder_of(tmp_path).resolve(layout_of(Block(layer="heads")))
    assert "workbench plugins --traceback" in str(caught.value)


def test_pattern(builder: Builder) -> None:
    assert builder.pattern(layout_of(Block(layer="heads"), Block(layer="heads"))) == "hh"


def test_a_build_is_seeded_and_leaves_the_global_generator_alone() -> None:
    builder, layout = toy_builder(), toy_layout()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    models = [builder.build(layout, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    first, again, other = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_weights_do_not_depend_on_what_the_generator_did_before() -> None:
    builder, layout = toy_builder(), toy_layout()
    first = builder.build(layout)
    torch.rand(3)
    again = builder.build(layout)
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_initial_weights_follow_the_published_scheme() -> None:
    """Normal with 0.02; the projections that write to the residual stream over sqrt(blocks)."""
    layout = toy_layout().replace(d_model=128)
    model = toy_builder().build(layout)
    mixer, mlp = model.layers[0], model.layers[1]
    assert isinstance(mixer, ToyMixer)
    assert isinstance(mlp, ToyMLP)
    for weight in (model.embedding.weight, mixer.in_proj.weight, mlp.up_proj.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.03)
    for weight in (mixer.out_proj.weight, mlp.down_proj.weight):
        assert weight.std().item() == pytest.approx(0.02 / 2, rel=0.03)
    assert not mixer.in_proj.bias.any()
    assert model.norm_f.weight.eq(1).all()
    assert mixer.decay_I.min() >= 0
    assert mixer.decay_I.max() <= 2


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_costs_total_is_the_models_parameters(tie_embeddings: bool, norm: str) -> None:
    builder = toy_builder()
    layout = toy_layout().replace(tie_embeddings=tie_embeddings, norm=norm)
    costs, model = builder.costs(layout, length=100), builder.build(layout)
    assert costs.total.parameters == sum(p.numel() for p in model.parameters())
    assert costs.total.parameters == model.num_parameters
    assert costs.weight_bytes == num_bytes(model)
    state = sum(state.num_bytes for state in model.init_state(1, 100))
    assert costs.total.state_bytes == state
    parts = costs.embedding + costs.head + costs.norm
    rows = sum(row.costs.parameters + row.norm_parameters for row in costs.blocks)
    assert parts + rows == costs.total.parameters
    assert [row.layer for row in costs.blocks] == [block.layer for block in layout.blocks]


def test_costs_add_up() -> None:
    """The total is the head's FLOPs and every row."""
    layout = toy_layout()
    costs = toy_builder().costs(layout, length=10)
    head = 2 * layout.vocab_size * layout.d_model
    rows = [row.costs for row in costs.blocks]
    assert costs.total.forward_flops == 10 * head + sum(row.forward_flops for row in rows)
    assert costs.total.decode_flops == head + sum(row.decode_flops for row in rows)
    assert costs.total.decode_state_bytes == sum(row.decode_state_bytes for row in rows)
    assert sum(rows, Costs()).parameters == sum(row.parameters for row in rows)


@pytest.mark.parametrize("size", [4, 2])
def test_quantized_weights_are_counted_as_stored(builder: Builder, size: int) -> None:
    half = Block(layer="heads", quantizer=Named(name="half"))
    layout = layout_of(half, Block(layer="heads"))
    costs = builder.costs(layout, length=1, bytes_per_element=size)
    model = builder.build(layout, dtype={4: torch.float32, 2: torch.bfloat16}[size])
    reports = builder.quantize(model)
    assert costs.weight_bytes == num_bytes(model)
    assert reports[0] is not None
    assert reports[0].quantized == {"proj": 2 * 3 * 16 * 16}
    assert reports[1] is None
    norm = 16 * size
    assert [row.weight_bytes - norm for row in costs.blocks] == [
        2 * 3 * 16 * 16,
        3 * 16 * 17 * size,
    ]


def test_eight_billion_parameters_take_no_memory(tmp_path: Path) -> None:
    wide = Block(layer="heads", quantizer=Named(name="half"))
    layout = Layout(d_model=8192, vocab_size=128_256, blocks=(wide,) * 35, tie_embeddings=False)
    write_plugin(tmp_path, "heads", PLUGIN)
    builder = builder_of(tmp_path)
    with Allocations() as allocations:
        model = builder.build(layout, device="meta", dtype=torch.bfloat16)
        costs = builder.costs(layout, length=4096, bytes_per_element=2)
    assert allocations.operations == []
    assert model.device.type == "meta"
    assert model.num_parameters == costs.total.parameters > 8_000_000_000


def test_allocations_are_noticed() -> None:
    """The instrument of the test above."""
    with Allocations() as allocations:
        torch.empty(3, device="meta").add(1)
        torch.zeros(2)
    assert len(allocations.operations) == 1
    assert "(2,) on cpu" in allocations.operations[0]


def test_load_without_any_plugin_is_empty() -> None:
    with only_these():
        builder = Builder.load()
    assert all(len(registry) == 0 for registry in builder.registries().values())
    with pytest.raises(UnknownNameError, match=r"unknown layer 'mamba'\. Known: none"):
        builder.build(layout_of(Block(layer="mamba")))


LIGHT = """
import sys, workbench
heavy = {"torch", "numpy", "pandas", "optuna", "streamlit", "transformers", "plotly", "typer"}
assert not heavy & set(sys.modules), sorted(heavy & set(sys.modules))
from workbench import Layout, Choice, WorkbenchError, Preset, Placement
assert not heavy & set(sys.modules), sorted(heavy & set(sys.modules))
assert workbench.Builder and "torch" in sys.modules
assert set(workbench.__all__) <= set(dir(workbench))
for name in workbench.__all__:
    getattr(workbench, name)
"""


def test_import_workbench_loads_nothing_heavy() -> None:
    """Nor do layouts, configs and presets; every public name is there when it is asked for."""
    subprocess.run([sys.executable, "-c", LIGHT], check=True)


def test_a_name_that_workbench_does_not_have() -> None:
    import workbench

    with pytest.raises(AttributeError, match="module 'workbench' has no attribute 'Bulider'"):
        workbench.Bulider  # noqa: B018
