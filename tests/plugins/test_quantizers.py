"""The quantizers on whole layers and models: what they keep, why, and every byte counted."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from workbench.builder import Builder
from workbench.config import NoConfig
from workbench.layer import Layer
from workbench.layout import Block, Layout, Named
from workbench.quantizer import QuantizationReport, Quantizer, num_bytes
from workbench.testing import QuantizerContract
from workbench_mamba.bitlinear import BitLinear
from workbench_mamba.bitlinear_mamba import BitLinearMamba
from workbench_quantizers.groupwise import GroupwiseConfig, Int4, Int8
from workbench_quantizers.stored import StoredLinear
from workbench_quantizers.ternary import B158

ALL: dict[str, tuple[type[Quantizer], Any]] = {
    "int8": (Int8, GroupwiseConfig()),
    "int4": (Int4, GroupwiseConfig()),
    "b1_58": (B158, NoConfig()),
}
BUILT_IN = ("mamba", "mamba2", "bitlinear_mamba", "attention", "swiglu", "relu2_mlp")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Zoo(Layer):
    """A layer with one module of each sort that a quantizer must tell apart."""

    keep_precision = {"dt_proj": "its weight is read directly", "gates": "too sensitive"}  # noqa: RUF012

    def __init__(self, **factory: Any) -> None:
        super().__init__(256, NoConfig(), **factory)
        self.in_proj = nn.Linear(256, 24, **factory)
        self.odd = nn.Linear(45, 7, bias=False, **factory)
        self.fits_nothing = nn.Linear(131, 8, **factory)
        self.dt_proj = nn.Linear(16, 8, **factory)
        self.gates = nn.ModuleList([nn.Linear(64, 64, **factory)])
        self.experts = nn.ModuleList([nn.Linear(200, 8, **factory) for _ in range(2)])
        self.ternary_proj = BitLinear(37, 12, bias=False, **factory)
        self.conv1d = nn.Conv1d(24, 24, 4, groups=24, **factory)
        self.norm = nn.RMSNorm(24, **factory)
        self.A_log = nn.Parameter(torch.zeros(24, **factory))
        self.D = nn.Parameter(torch.ones(24, **factory))


def quantize(layer: Layer, name: str, **config: Any) -> QuantizationReport:
    quantizer, default = ALL[name]
    return quantizer.quantize(layer, dataclasses.replace(default, **config))


class TestInt8(QuantizerContract):
    quantizer = Int8
    configs = (GroupwiseConfig(), GroupwiseConfig(group_size=32))
    max_error = 0.01


class TestInt4(QuantizerContract):
    quantizer = Int4
    configs = (GroupwiseConfig(), GroupwiseConfig(group_size=32))
    max_error = 0.2


class TestB158(QuantizerContract):
    quantizer = B158
    configs = (NoConfig(),)
    layer = BitLinearMamba
    layer_config = BitLinearMamba.Config(bit_x_proj=True, bit_dt_proj=True)
    max_error = 1e-5


# Layers: bytes, what is kept and why


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_bytes_are_exact_and_the_same_on_the_meta_device(name: str, dtype: torch.dtype) -> None:
    layer, planned = Zoo(dtype=dtype), Zoo(dtype=dtype, device="meta")
    before = {path: p.nbytes for path, p in layer.named_parameters()}
    report = quantize(layer, name)
    assert quantize(planned, name) == report
    replaced = {f"{path}.weight" for path in report.quantized}
    assert replaced <= set(before)
    unchanged = sum(size for path, size in before.items() if path not in replaced)
    assert num_bytes(layer) == num_bytes(planned) == sum(report.quantized.values()) + unchanged
    assert all(size < before[f"{path}.weight"] for path, size in report.quantized.items())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("int8", {"in_proj": 24 * (256 + 2 * 4), "odd": 7 * (45 + 4), "experts.0": 8 * (200 + 8)}),
        ("int4", {"in_proj": 24 * (128 + 2 * 4), "odd": 7 * (23 + 4), "experts.0": 8 * (100 + 8)}),
    ],
)
def test_bytes_of_a_linear(name: str, expected: dict[str, int]) -> None:
    """Integers a row (int4 rounded up to whole bytes) and a float32 scale a group of a row."""
    quantized = quantize(Zoo(), name).quantized
    ternary = 12 * 10 + 4
    assert quantized == {
        **expected,
        "experts.1": expected["experts.0"],
        "ternary_proj": ternary,
    }


def test_bytes_of_a_packed_bitlinear() -> None:
    assert quantize(Zoo(), "b1_58").quantized == {"ternary_proj": 12 * 10 + 4}


@pytest.mark.parametrize("name", ALL)
def test_reports_account_for_every_parameter(name: str) -> None:
    layer = Zoo()
    parameters = [path for path, _ in layer.named_parameters()]
    report = quantize(layer, name)
    named = [*report.quantized, *report.kept]
    assert len(named) == len(set(named))
    for path in parameters:
        module = path.rpartition(".")[0]
        assert (module or path) in named, path
    assert all(report.kept.values())


@pytest.mark.parametrize("name", ALL)
def test_what_must_keep_its_precision_is_untouched(name: str) -> None:
    layer = Zoo()
    before = copy.deepcopy(dict(layer.named_modules()))
    kept = quantize(layer, name).kept
    assert kept["dt_proj"] == "its weight is read directly"
    assert kept["gates.0"] == "too sensitive"
    assert kept["conv1d"] == "not a linear (Conv1d)"
    assert kept["norm"] == "not a linear (RMSNorm)"
    for path in ("A_log", "D"):
        assert "not a linear" in kept[path]
    for path, module in layer.named_modules():
        if path in kept:
            assert type(module) is type(before[path])
            for key, value in module.state_dict().items():
                assert torch.equal(value, before[path].state_dict()[key])


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_integers_leave_alone_what_they_would_not_serve(name: str) -> None:
    kept = quantize(Zoo(), name).kept
    assert kept["fits_nothing"].startswith("too small: would take ")


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_integers_pack_what_was_trained_ternary(name: str) -> None:
    layer, reference = Zoo(), Zoo()
    reference.load_state_dict(layer.state_dict())
    report = quantize(layer, name)
    packed = quantize(reference, "b1_58").quantized["ternary_proj"]
    assert report.quantized["ternary_proj"] == packed
    assert torch.equal(layer.ternary_proj.weight, reference.ternary_proj.weight)


def test_ternaries_are_packed_only_where_they_were_trained() -> None:
    kept = quantize(Zoo(), "b1_58").kept
    assert "not trained with ternary weights" in kept["in_proj"]


@pytest.mark.parametrize("name", ALL)
def test_quantizing_again_reports_the_same(name: str) -> None:
    layer = Zoo()
    report, modules = quantize(layer, name), dict(layer.named_modules())
    assert quantize(layer, name) == report
    assert dict(layer.named_modules()) == modules


def test_another_quantizer_leaves_it_as_it_is() -> None:
    layer = Zoo()
    first = quantize(layer, "int8")
    second = quantize(layer, "int4")
    assert set(second.quantized) == {"ternary_proj"}  # both store it as b1.58
    left = set(first.quantized) - {"ternary_proj"}
    assert {second.kept[path] for path in left} == {"is stored as int8 already"}


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_diverged_weight_stays_diverged(name: str, poison: float) -> None:
    """Integers know no NaN: finite figures of a diverged run would be a lie."""
    layer = Zoo()
    with torch.no_grad():
        layer.in_proj.weight[3, 5] = poison
    quantize(layer, name)
    y = layer.in_proj(torch.ones(256))
    assert not y[3].isfinite()
    assert y[:3].isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_saved_weights_load_into_a_model_planned_on_meta(name: str, tmp_path: Path) -> None:
    layer = Zoo()
    quantize(layer, name)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    planned = Zoo(device="meta")
    quantize(planned, name)
    planned.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)
    pairs = zip(layer.modules(), planned.modules(), strict=True)
    stored = [pair for pair in pairs if isinstance(pair[0], StoredLinear)]
    assert stored
    for original, loaded in stored:
        x = torch.randn(3, original.in_features)
        assert torch.equal(loaded(x), original(x))


# Built-in layers in a model


@pytest.fixture(scope="module")
def built_ins() -> Builder:
    return Builder.load()


def hybrid(builder: Builder, layer: str, quantizer: str | None) -> Layout:
    named = None if quantizer is None else Named(name=quantizer)
    config = {"headdim": 32} if layer == "mamba2" else {}
    block = Block(layer=layer, config=config, quantizer=named)
    return builder.resolve(Layout(d_model=192, vocab_size=64, blocks=(block, block)))


@pytest.mark.parametrize("quantizer", ALL)
@pytest.mark.parametrize("layer", BUILT_IN)
def test_planned_bytes_are_those_of_the_built_model(
    built_ins: Builder, layer: str, quantizer: str
) -> None:
    layout = hybrid(built_ins, layer, quantizer)
    for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2)):
        model = built_ins.build(layout, dtype=dtype)
        built_ins.quantize(model)
        planned = built_ins.costs(layout, length=16, bytes_per_element=width).weight_bytes
        assert planned == num_bytes(model)


@pytest.mark.parametrize("quantizer", ALL)
@pytest.mark.parametrize("layer", BUILT_IN)
def test_quantized_layers_still_decode(built_ins: Builder, layer: str, quantizer: str) -> None:
    model = built_ins.build(hybrid(built_ins, layer, quantizer))
    tokens_BT = torch.randint(64, (2, 12))
    with torch.no_grad():
        before = model(tokens_BT)
        reports = built_ins.quantize(model)
        full = model(tokens_BT)
        states = model.init_state(2, 12)
        stepped = torch.stack([model.step(tokens_B, states) for tokens_B in tokens_BT.T], dim=1)
    torch.testing.assert_close(stepped, full, rtol=1e-4, atol=1e-4)
    ternary = layer == "bitlinear_mamba"
    packs = ternary or quantizer != "b1_58"
    assert all(bool(report and report.quantized) == packs for report in reports)
    change = float((full - before).norm() / before.norm())
    lossy = {"int8": (1e-5, 0.05), "int4": (1e-3, 0.5), "b1_58": (0, 1e-5)}
    least, most = lossy["b1_58" if ternary else quantizer]
    assert (least if packs else 0) <= change <= (most if packs else 0)
