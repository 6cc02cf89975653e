"""The contract suite, compressed-tensors' own arithmetic, and what the format promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lm_fp8_quantizer import E4M3, Fp8, Fp8Linear, quantize_blocks
from torch import nn

from workbench.builder import Builder
from workbench.config import NoConfig
from workbench.errors import FieldError
from workbench.layer import Layer
from workbench.layout import Block, Layout, Named
from workbench.quantizer import num_bytes
from workbench.testing import QuantizerContract


class TestFp8(QuantizerContract):
    quantizer = Fp8
    configs = (Fp8.Config(), Fp8.Config(block_size=128), Fp8.Config(block_size=40))
    max_error = 0.04


class Odd(nn.Linear):
    """A linear of its own kind."""


class Zoo(Layer):
    """A bit of everything that a quantizer meets."""

    kind = "mlp"
    keep_precision = {"dt_proj": "its output is exponentiated"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__(64, NoConfig())
        self.in_proj = nn.Linear(64, 48)
        self.dt_proj = nn.Linear(64, 48)
        self.odd = Odd(64, 48)
        self.tiny = nn.Linear(1, 4, bias=False)
        self.norm = nn.RMSNorm(64)


def test_reports_exact_bytes_and_why_the_rest_was_left_alone() -> None:
    report = Fp8.quantize(Zoo(), Fp8.Config())
    assert report.quantized == {"in_proj": 48 * 64 + 48 * 4}
    assert report.kept == {
        "dt_proj": "its output is exponentiated",
        "odd": "computes in its own way (Odd)",
        "tiny": "too small: would take 20 bytes, not 16",
        "norm": "not a linear (RMSNorm)",
    }
    in_blocks = Fp8.quantize(Zoo(), Fp8.Config(block_size=32)).quantized
    assert in_blocks == {"in_proj": 48 * 64 + 4 * 4, "tiny": 4 + 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "block"), [((48, 200), None), ((256, 384), 128), ((7, 1), None)])
def test_equals_compressed_tensors(
    dtype: torch.dtype, shape: tuple[int, int], block: int | None
) -> None:
    """Their observer's arithmetic and their fake quantization, to the bit."""
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], dtype=dtype)
    with torch.no_grad():
        linear.weight.mul_(torch.logspace(-3, 2, shape[0])[:, None])
        linear.weight[0] = 0
    stored = Fp8Linear(linear, block)
    weight = linear.weight.detach()
    if block is None:
        args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="channel")
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    else:
        args = QuantizationArgs(
            num_bits=8, type="float", symmetric=True, strategy="block", block_structure=[block] * 2
        )
        tiles = weight.reshape(shape[0] // block, block, shape[1] // block, block)
        low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
    scale, zero_point = calculate_qparams(low, high, args)
    assert torch.equal(stored.weight_scale, scale)
    assert torch.equal(stored.weight, fake_quantize(weight, scale, zero_point, args))


def test_ragged_blocks_are_those_of_their_own_corner() -> None:
    weight = torch.randn(70, 45, generator=torch.Generator().manual_seed(0))
    numbers, scale = quantize_blocks(weight, (32, 32))
    assert scale.shape == (3, 2)
    for row in range(3):
        for column in range(2):
            part = slice(32 * row, 32 * row + 32), slice(32 * column, 32 * column + 32)
            alone, own_scale = quantize_blocks(weight[part], (128, 128))
            assert torch.equal(own_scale[0, 0], scale[row, column])
            assert torch.equal(alone.view(torch.uint8), numbers[part].view(torch.uint8))


def test_every_e4m3_number_is_stored_as_it_is() -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    weight = numbers[numbers.isfinite()].reshape(2, -1)
    linear = nn.Linear(weight.shape[1], 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight)
    assert torch.equal(Fp8Linear(linear, None).weight, weight)


def test_relative_error_is_at_most_a_sixteenth() -> None:
    """Three bits of mantissa; below 2^-6 of the scale's unit numbers are evenly spaced instead."""
    linear = nn.Linear(500, 8, dtype=torch.float64)
    stored = Fp8Linear(linear, None)
    weight = linear.weight.detach()
    error = (stored.weight - weight).abs()
    assert (error <= torch.maximum(weight.abs() / 16, stored.weight_scale * 2.0**-10)).all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_diverged_weight_stays_diverged(poison: float) -> None:
    layer = Zoo()
    with torch.no_grad():
        layer.in_proj.weight[3, 5] = poison
    Fp8.quantize(layer, Fp8.Config())
    y = layer.in_proj(torch.ones(64))
    assert not y[3].isfinite()
    assert y[:3].isfinite().all()


def test_converting_the_model_leaves_the_numbers_alone() -> None:
    linear = nn.Linear(64, 32).to(torch.bfloat16)
    stored = Fp8Linear(linear, None)
    bits, scale = stored.weight_packed.clone(), stored.weight_scale.float()
    stored.to(torch.float32)
    assert stored.weight_packed.dtype == torch.uint8
    assert torch.equal(stored.weight_packed, bits)
    assert torch.equal(stored.weight, bits.view(E4M3).float() * scale)


def test_block_size_must_be_positive() -> None:
    with pytest.raises(FieldError, match="block_size: must be at least 1, got 0"):
        Fp8.Config(block_size=0)


def make_model(builder: Builder) -> Layout:
    quantizer = Named(name="fp8", config={"block_size": 16})
    names = ("attention", "swiglu")
    blocks = tuple(Block(layer=name, quantizer=quantizer) for name in names)
    return builder.resolve(Layout(d_model=64, vocab_size=64, blocks=blocks))


def test_counted_bytes_are_those_of_the_built_model() -> None:
    builder = Builder.load([Path(__file__).parent])
    layout = make_model(builder)
    model = builder.build(layout)
    builder.quantize(model)
    assert builder.costs(layout, length=1).weight_bytes == num_bytes(model)


@pytest.mark.slow
def test_exports_and_reloads_in_a_fresh_process(tmp_path: Path) -> None:
    builder = Builder.load([Path(__file__).parent])
    model = builder.build(make_model(builder)).eval()
    exporter = builder.exporters["huggingface"]
    report = exporter.export(model, builder, tmp_path / "out", exporter.Config(), {})
    assert report.max_difference <= 1e-5
