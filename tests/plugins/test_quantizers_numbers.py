"""int8 and int4 against compressed-tensors, b1.58 against BitLinear: packing, groups, linears."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from workbench.errors import FieldError
from workbench_mamba.bitlinear import BitLinear
from workbench_quantizers.groupwise import (
    GroupwiseConfig,
    GroupwiseLinear,
    fit_group_size,
    quantize_groups,
)
from workbench_quantizers.packing import pack, unpack
from workbench_quantizers.ternary import PackedBitLinear


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


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
