"""SwiGLU and the squared-ReLU MLP against transformers' modules with the same weights.

Shape suffixes: B batch, T tokens, D d_model.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, NemotronHConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMLP

from workbench import config as configs
from workbench.builder import default_builder
from workbench.errors import FieldError
from workbench.layer import Layer
from workbench_mlp.relu2 import ReLU2MLP
from workbench_mlp.swiglu import SwiGLU
from workbench_mlp.width import intermediate_size

MLPS: dict[str, type[Layer]] = {"swiglu": SwiGLU, "relu2_mlp": ReLU2MLP}
each_mlp = pytest.mark.parametrize("mlp", MLPS.values(), ids=MLPS)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def build(mlp: type[Layer], d_model: int, **values: Any) -> Layer:
    return mlp(d_model, configs.from_dict(mlp.Config, values))


def relative(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max())


def theirs(mlp: type[Layer], bias: bool) -> nn.Module:
    values: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "mlp_bias": bias}
    if mlp is SwiGLU:
        return LlamaMLP(LlamaConfig(**values))
    return NemotronHMLP(NemotronHConfig(**values))


@pytest.mark.parametrize("bias", [False, True])
@each_mlp
def test_outputs_and_gradients_equal_those_of_transformers(mlp: type[Layer], bias: bool) -> None:
    torch.manual_seed(0)
    reference = theirs(mlp, bias)
    layer = build(mlp, 32, intermediate_size=48, bias=bias)
    layer.load_state_dict(reference.state_dict())
    x_BTD = torch.randn(2, 7, 32)
    ours_BTD, theirs_BTD = x_BTD.clone().requires_grad_(), x_BTD.clone().requires_grad_()
    actual_BTD, expected_BTD = layer(ours_BTD), reference(theirs_BTD)
    actual_BTD.square().sum().backward()
    expected_BTD.square().sum().backward()

    assert relative(actual_BTD, expected_BTD) < 1e-5
    assert ours_BTD.grad is not None
    assert theirs_BTD.grad is not None
    assert relative(ours_BTD.grad, theirs_BTD.grad) < 1e-5
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        assert gradients[name] is not None
        assert relative(parameter.grad, gradients[name]) < 1e-5, name


@each_mlp
@pytest.mark.parametrize(
    "values",
    [{}, {"bias": True}, {"intermediate_size": 50}, {"expand": 1.3, "multiple_of": 1}],
)
def test_flops_equal_those_counted(mlp: type[Layer], values: dict[str, Any]) -> None:
    layer = build(mlp, 48, **values)
    costs = mlp.costs(48, layer.config, length=9)
    for length, flops in ((9, costs.forward_flops), (1, costs.decode_flops)):
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(1, length, 48))
        assert flops == counter.get_total_flops()


@pytest.mark.parametrize(
    ("d_model", "values", "width"),
    [
        (256, {}, 704),  # 8/3 · 256 = 682.7
        (768, {}, 2048),  # 8/3 · 768 is a multiple already
        (4096, {"multiple_of": 256}, 11008),  # Llama-7B
        (2048, {"multiple_of": 256}, 5632),  # TinyLlama-1.1B
        (5120, {"multiple_of": 256}, 13824),  # Llama-13B
        (100, {"expand": 4.0, "multiple_of": 1}, 400),
        (100, {"intermediate_size": 77}, 77),
    ],
)
def test_the_inner_width_is_rounded_up(d_model: int, values: dict[str, Any], width: int) -> None:
    config = configs.from_dict(SwiGLU.Config, values)
    assert intermediate_size(d_model, config) == width


def test_rounding_up_never_adds_a_unit_to_an_exact_multiple() -> None:
    config = configs.from_dict(SwiGLU.Config, {})
    for units in range(1, 400):
        assert intermediate_size(12 * units, config) == 32 * units


@each_mlp
def test_they_are_registered_and_build_on_the_meta_device(mlp: type[Layer]) -> None:
    names = {"swiglu": SwiGLU, "relu2_mlp": ReLU2MLP}
    assert {name: default_builder().layers[name] for name in names} == names
    layer = mlp(4096, configs.from_dict(mlp.Config, {}), device="meta", dtype=torch.bfloat16)
    assert layer(torch.empty(1, 2, 4096, device="meta", dtype=torch.bfloat16)).shape == (1, 2, 4096)


@each_mlp
@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"intermediate_size": 0}, "intermediate_size"),
        ({"multiple_of": 0}, "multiple_of"),
        ({"expand": 0.0}, "expand"),
        ({"expand": float("inf")}, "expand"),
        ({"expand": float("nan")}, "expand"),
    ],
)
def test_what_cannot_be_built_is_refused_by_field(
    mlp: type[Layer], values: dict[str, Any], field: str
) -> None:
    with pytest.raises(FieldError) as caught:
        mlp.check(64, configs.from_dict(mlp.Config, values))
    assert caught.value.field == field
