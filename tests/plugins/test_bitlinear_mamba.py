"""BitLinear against transformers' BitNet and its own integer arithmetic; BitLinear-Mamba's parts.

Shape suffixes: B batch, T tokens, D d_model, C inner channels.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import FieldError
from workbench_mamba.bitlinear import BitLinear, quantize_activations, ternarize
from workbench_mamba.bitlinear_mamba import BitLinearMamba
from workbench_mamba.mamba import Mamba

D_MODEL = 32


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


# The quantizers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("std", [1e-7, 0.02, 3.0])
def test_ternarize_is_the_formula_of_b158(dtype: torch.dtype, std: float) -> None:
    weight = (std * torch.randn(24, 40)).to(dtype)
    ternary, scale = ternarize(weight)
    assert ternary.dtype == torch.int8
    assert ternary.unique().tolist() in ([-1, 0, 1], [0])
    assert scale.dtype == torch.float32
    assert scale.shape == ()
    mean = max(sum(abs(value) for value in weight.double().flatten().tolist()) / 960, 1e-5)
    assert scale.item() == pytest.approx(mean, rel=1e-6)
    expected = [max(-1, min(1, round(value / mean))) for value in weight.flatten().tolist()]
    assert ternary.flatten().tolist() == expected


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_activations_have_one_scale_a_token(bits: int) -> None:
    x_BTD = torch.randn(3, 5, 40) * torch.logspace(-4, 3, 5)[:, None]
    values, scale = quantize_activations(x_BTD, bits)
    top = 2 ** (bits - 1) - 1
    assert values.dtype == torch.int8
    assert values.shape == x_BTD.shape
    assert scale.shape == (3, 5, 1)
    assert (values.abs().amax(-1) == top).all()
    assert ((values * scale - x_BTD).abs() <= scale * 0.5001).all()


def test_all_zeros_quantize_to_zeros() -> None:
    values, scale = quantize_activations(torch.zeros(2, 8))
    assert (values == 0).all()
    assert (scale > 0).all()
    ternary, scale = ternarize(torch.zeros(4, 8))
    assert (ternary == 0).all()
    assert scale.item() > 0


# BitLinear


@pytest.fixture
def bitnet() -> Iterator[ModuleType]:
    """transformers' BitNet, without compiling what it wraps in torch.compile."""
    with warnings.catch_warnings():  # of the compiler's own imports
        warnings.simplefilter("ignore", DeprecationWarning)
        module = importlib.import_module("transformers.integrations.bitnet")
    with torch.compiler.set_stance("force_eager"):
        yield module


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_equal_bitnet(bias: bool, bitnet: ModuleType) -> None:
    layer = BitLinear(40, 24, bias)
    reference = bitnet.AutoBitLinear(40, 24, bias, online_quant=True)
    reference.load_state_dict(layer.state_dict())
    x_BTD, weights = torch.randn(3, 5, 40), torch.randn(3, 5, 24)
    results = []
    for module in (layer, reference):
        x = x_BTD.clone().requires_grad_()
        y = module(x)
        (y * weights).sum().backward()
        results.append((y, x.grad, *(parameter.grad for parameter in module.parameters())))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_integer_arithmetic_gives_the_same_output() -> None:
    layer = BitLinear(64, 24)
    x = torch.randn(7, 64)
    values, x_scale = quantize_activations(x, layer.act_bits)
    ternary, w_scale = ternarize(layer.weight)
    integers = values.int() @ ternary.int().T
    assert integers.dtype == torch.int32
    torch.testing.assert_close(
        integers * (x_scale * w_scale) + layer.bias, layer(x), rtol=1e-5, atol=1e-6
    )


def test_gradients_pass_straight_through_both_quantizers() -> None:
    layer = BitLinear(16, 8, bias=False)
    x = torch.randn(5, 16, requires_grad=True)
    direction = torch.randn(5, 8)
    layer(x).backward(direction)
    ternary, w_scale = ternarize(layer.weight)
    values, x_scale = quantize_activations(x)
    torch.testing.assert_close(x.grad, direction @ (ternary * w_scale))
    torch.testing.assert_close(layer.weight.grad, direction.T @ (values * x_scale))


def test_training_moves_the_ternaries() -> None:
    layer = BitLinear(16, 8)
    target = BitLinear(16, 8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    x = torch.randn(256, 16)
    goal = target(x).detach()
    losses = []
    for _ in range(200):
        loss = F.mse_loss(layer(x), goal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_outputs_and_gradients_keep_their_dtypes(dtype: torch.dtype) -> None:
    layer = BitLinear(16, 8, dtype=dtype)
    for x_dtype in (dtype, torch.float32):
        x = torch.randn(5, 16, dtype=x_dtype, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.dtype == x_dtype
        assert x.grad is not None
        assert x.grad.dtype == x_dtype
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == dtype


# BitLinear-Mamba

FLAGS = [
    (x_proj, dt_proj, dt_bc_norm)
    for x_proj in (False, True)
    for dt_proj in (False, True)
    for dt_bc_norm in (False, True)
]


def build(**values: Any) -> BitLinearMamba:
    layer = BitLinearMamba(D_MODEL, BitLinearMamba.Config(**values))
    layer.reset_parameters()
    return layer


def fake_quantized(linear: nn.Linear, x: Tensor) -> Tensor:
    """b1.58 written out once more, at float32."""
    s_w = 1 / linear.weight.abs().mean()
    s_x = 127 / x.abs().max(-1, keepdim=True).values
    weight = (linear.weight * s_w).round().clamp(-1, 1) / s_w
    return F.linear((x * s_x).round().clamp(-128, 127) / s_x, weight, linear.bias)


@torch.no_grad()
@pytest.mark.parametrize(("x_proj", "dt_proj", "dt_bc_norm"), FLAGS)
def test_it_is_mamba_with_quantized_projections_and_a_norm(
    x_proj: bool, dt_proj: bool, dt_bc_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = build(bit_x_proj=x_proj, bit_dt_proj=dt_proj, dt_bc_norm=dt_bc_norm)
    layer.norm.weight.uniform_(0.5, 1.5)
    x_BTD = torch.randn(2, 11, D_MODEL)
    actual = layer(x_BTD)

    plain = Mamba(D_MODEL, Mamba.Config(dt_bc_norm=dt_bc_norm))
    weights = layer.state_dict()
    del weights["norm.weight"]
    plain.load_state_dict(weights)
    quantized = {"in_proj": True, "x_proj": x_proj, "dt_proj": dt_proj, "out_proj": True}
    for name, is_quantized in quantized.items():
        linear = plain.get_submodule(name)
        if is_quantized:
            monkeypatch.setattr(
                linear, "forward", lambda x, linear=linear: fake_quantized(linear, x)
            )
    monkeypatch.setattr(plain, "_dt", lambda dt: (plain.dt_proj(dt), None))
    monkeypatch.setattr(
        plain,
        "_output",
        lambda y, z: plain.out_proj(
            F.rms_norm(y * F.silu(z), (64,), layer.norm.weight, layer.config.norm_eps)
        ),
    )
    torch.testing.assert_close(actual, plain(x_BTD), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("x_proj", "dt_proj", "dt_bc_norm"), FLAGS)
def test_ternary_projections_may_be_packed_and_others_are_kept(
    x_proj: bool, dt_proj: bool, dt_bc_norm: bool
) -> None:
    layer = build(bit_x_proj=x_proj, bit_dt_proj=dt_proj, dt_bc_norm=dt_bc_norm)
    ternary = {name for name, module in layer.named_modules() if isinstance(module, BitLinear)}
    linears = {name for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    assert linears == {"in_proj", "x_proj", "dt_proj", "out_proj"}
    assert ternary == linears - set(layer.keep_precision)
    assert all(layer.keep_precision.values())
    assert set(Mamba.keep_precision) == {"x_proj", "dt_proj"}


@torch.no_grad()
def test_out_proj_quantizes_normed_inputs() -> None:
    layer = build(norm_eps=1e-12)
    seen = []
    layer.out_proj.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    layer(torch.randn(2, 6, D_MODEL))
    layer.step(torch.randn(2, D_MODEL), layer.init_state(2, 1))
    for x in seen:
        mean_squares = x.square().mean(-1)
        torch.testing.assert_close(mean_squares, torch.ones_like(mean_squares), rtol=0, atol=1e-2)
    assert len(seen) == 2


def test_every_parameter_learns() -> None:
    layer = build(bit_x_proj=True, bit_dt_proj=True)
    layer(torch.randn(2, 9, D_MODEL)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_unpacked_it_costs_a_norm_more_than_mamba() -> None:
    config = BitLinearMamba.Config()
    ternary = BitLinearMamba.costs(64, config, length=10)
    plain = Mamba.costs(64, Mamba.Config(), length=10)
    assert ternary.parameters == plain.parameters + 128
    assert ternary.active_parameters == ternary.parameters
    assert ternary.forward_flops == plain.forward_flops
    assert ternary.state_bytes == plain.state_bytes


@pytest.mark.parametrize("bits", [1, 9])
def test_activation_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(FieldError, match="act_bits: must be from 2 to 8"):
        BitLinearMamba.check(64, BitLinearMamba.Config(act_bits=bits))
