"""int8 and int4 against compressed-tensors, b1.58 against BitLinear, and every byte counted."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from workbench.builder import Builder
from workbench.config import NoConfig
from workbench.errors import FieldError
from workbench.layer import Layer
from workbench.layout import Block, Layout, Named
from workbench.quantizer import QuantizationReport, Quantizer, num_bytes
from workbench.testing import QuantizerContract
from workbench_mamba.bitlinear import BitLinear
from workbench_mamba.bitlinear_mamba import BitLinearMamba
from workbench_quantizers.groupwise import (
    GroupwiseConfig,
    GroupwiseLinear,
    Int4,
    Int8,
    fit_group_size,
    quantize_groups,
)
from workbench_quantizers.packing import pack, unpack
from workbench_quantizers.stored import StoredLinear
from workbench_quantizers.ternary import B158, PackedBitLinear

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


# Packing


@given(
    bits=st.sampled_from([2, 4]), rows=st.integers(1, 3), length=st.integers(1, 67), data=st.data()
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_packing_loses_nothing_and_wastes_less_than_a_byte_a_row(
    bits: int, rows: int, length: int, data: st.DataObject
) -> None:
    seed = data.draw(st.integers(0, 2**16))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(low, high, (rows, length), generator=generator, dtype=torch.int8)
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-length * bits // 8))
    restored = unpack(packed, bits, length)
    assert restored.dtype == torch.int8
    assert torch.equal(restored, values)


def test_the_first_run_of_a_row_is_in_the_lowest_bits() -> None:
    assert pack(torch.tensor([[-8, 7]], dtype=torch.int8), 4).tolist() == [[0xF0]]
    assert pack(torch.tensor([[-1, 0, 1]], dtype=torch.int8), 2).tolist() == [[0b11_10_01]]
    row = torch.tensor([0, 1, 2, 3], dtype=torch.int8)
    assert pack(row, 4).tolist() == [0xA8, 0xB9]  # 0 and 2, 1 and 3, with the offset of 8


# Groups


@given(in_features=st.integers(1, 4096), group_size=st.integers(1, 256))
@settings(deadline=None, derandomize=True)
def test_group_size_is_the_largest_divisor_that_fits(in_features: int, group_size: int) -> None:
    size = fit_group_size(in_features, group_size)
    assert in_features % size == 0
    assert size <= group_size
    assert not any(in_features % other == 0 for other in range(size + 1, group_size + 1))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_features", [256, 200, 45, 16])
def test_equals_compressed_tensors(bits: int, dtype: torch.dtype, in_features: int) -> None:
    """Their observer's arithmetic, their fake quantization, their stored and restored weights."""
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    linear = nn.Linear(in_features, 48, dtype=dtype)
    with torch.no_grad():
        linear.weight.mul_(torch.logspace(-6, 2, 48)[:, None])
        linear.weight[0] = 0
    mine = GroupwiseLinear(linear, bits, 128)
    args = QuantizationArgs(
        num_bits=bits, type="int", symmetric=True, strategy="group", group_size=mine.group_size
    )
    weight = linear.weight.detach()
    groups = weight.reshape(48, -1, mine.group_size)
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    assert torch.equal(mine.weight_scale, scale)
    assert torch.equal(mine.weight, fake_quantize(weight, scale, zero_point, args))

    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    theirs = PackedQuantizationCompressor.compress(
        {"weight": weight, "weight_scale": scale}, scheme
    )
    restored = PackedQuantizationCompressor.decompress(theirs, scheme)["weight"]
    assert torch.equal(mine.weight, restored)


@pytest.mark.parametrize("bits", [4, 8])
def test_error_is_at_most_half_a_scale(bits: int) -> None:
    weight = torch.randn(32, 192, dtype=torch.float64)
    integers, scale = quantize_groups(weight, bits, 64)
    assert int(integers.min()) >= -(2 ** (bits - 1))
    assert int(integers.max()) <= 2 ** (bits - 1) - 1
    step = scale.repeat_interleave(64, dim=1)
    assert ((integers * step - weight).abs() <= step * (0.5 + 1e-9)).all()


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


def test_group_size_must_be_positive() -> None:
    with pytest.raises(FieldError, match="group_size: must be at least 1, got 0"):
        GroupwiseConfig(group_size=0)


# Stored linears


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_the_linear_of_the_stored_weights(
    bits: int, bias: bool, dtype: torch.dtype
) -> None:
    linear = nn.Linear(200, 24, bias=bias, dtype=dtype)
    stored = GroupwiseLinear(linear, bits, 128)
    assert stored.group_size == 100
    x = torch.randn(2, 3, 200, dtype=dtype)
    assert torch.equal(stored(x), F.linear(x, stored.weight, linear.bias))
    distance = (stored.weight - linear.weight).norm() / linear.weight.norm()
    assert distance < {4: 0.12, 8: 0.01}[bits]


def test_gradients_reach_the_inputs() -> None:
    stored = GroupwiseLinear(nn.Linear(64, 8), 4, 32)
    x = torch.randn(5, 64, requires_grad=True)
    stored(x).sum().backward()
    torch.testing.assert_close(x.grad, stored.weight.sum(0).expand(5, -1))


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_features", [64, 37])
def test_packed_bitlinear_equals_its_straight_through_output(
    act_bits: int, dtype: torch.dtype, in_features: int
) -> None:
    linear = BitLinear(in_features, 24, dtype=dtype, act_bits=act_bits)
    packed = PackedBitLinear(linear)
    scales = torch.logspace(-3, 3, 7)[:, None]
    x = (torch.randn(5, 7, in_features) * scales).to(dtype)
    x[0, 0] = 0
    expected = linear(x)
    torch.testing.assert_close(packed(x), expected, rtol=1e-5, atol=1e-5)
    assert packed(x).dtype == dtype
    assert packed.weight_packed.shape == (24, -(-in_features // 4))
    assert packed.weight_bytes == packed.weight_packed.numel() + 4


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
