"""Mamba against transformers' Mamba and Jamba with the same weights.

Shape suffixes: B batch, T tokens, D d_model, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import JambaConfig, MambaConfig, MambaForCausalLM
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.mamba.modeling_mamba import MambaMixer

from workbench.builder import Builder, default_builder
from workbench.errors import FieldError
from workbench.layer import Context
from workbench.layout import Block, Layout
from workbench_mamba.mamba import Mamba

D_MODEL = 32
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "biases": {"bias": True, "conv_bias": False, "d_conv": 3},
    "shape": {"d_state": 8, "expand": 3, "dt_rank": 5},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def builder() -> Builder:
    return default_builder()


def disturb(module: nn.Module) -> None:
    """Move every parameter, so that none is neutral and none equal to another."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def mamba_mixer(values: dict[str, Any], d_model: int) -> MambaMixer:
    names = {
        "d_state": "state_size",
        "d_conv": "conv_kernel",
        "dt_rank": "time_step_rank",
        "bias": "use_bias",
        "conv_bias": "use_conv_bias",
    }
    renamed = {names.get(name, name): value for name, value in values.items()}
    return MambaMixer(MambaConfig(hidden_size=d_model, **renamed), layer_idx=0)


def jamba_mixer(values: dict[str, Any], d_model: int) -> JambaMambaMixer:
    names = {"bias": "mamba_proj_bias"}
    renamed = {names.get(name, f"mamba_{name}"): value for name, value in values.items()}
    rank = renamed.pop("mamba_dt_rank", 2)
    config = JambaConfig(hidden_size=d_model, mamba_dt_rank=rank, **renamed)
    return JambaMambaMixer(config, layer_idx=0)


MIXERS = {"mamba": mamba_mixer, "jamba": jamba_mixer}


def pair(family: str, values: dict[str, Any]) -> tuple[Mamba, nn.Module]:
    """Our layer and theirs, one state dict."""
    torch.manual_seed(0)
    reference = MIXERS[family](values, D_MODEL)
    disturb(reference)
    layer = Mamba(D_MODEL, Mamba.Config(**values, dt_bc_norm=family == "jamba"))
    layer.load_state_dict(reference.state_dict())
    return layer, reference.eval()


FAMILIES = pytest.mark.parametrize("family", ["mamba", "jamba"])


@FAMILIES
@pytest.mark.parametrize("name", list(OPTIONS))
def test_outputs_and_gradients_equal_the_reference(family: str, name: str) -> None:
    layer, reference = pair(family, OPTIONS[name])
    x_BTD = torch.randn(2, 21, D_MODEL)
    weights_BTD = torch.randn(2, 21, D_MODEL)
    results = []
    for module in (layer, reference):
        x = x_BTD.clone().requires_grad_()
        y = module(x)
        (y * weights_BTD).sum().backward()
        gradients = {key: parameter.grad for key, parameter in module.named_parameters()}
        results.append((y.detach(), {"x": x.grad, **gradients}))
    (actual, actual_gradients), (expected, gradients) = results
    assert relative(actual, expected) < 1e-5
    assert actual_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert gradient is not None
        assert relative(actual_gradients[key], gradient) < 1e-4, key


@FAMILIES
@torch.no_grad()
def test_left_padding_equals_the_reference(family: str) -> None:
    layer, reference = pair(family, {})
    x_BTD = torch.randn(2, 15, D_MODEL)
    mask_BT = torch.arange(15) >= torch.tensor([[0], [6]])
    expected = reference(x_BTD, attention_mask=mask_BT.long())
    actual = layer(x_BTD, Context(attention_mask_BT=mask_BT))
    assert relative(actual[mask_BT], expected[mask_BT]) < 1e-5


@FAMILIES
@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("d_model", [64, 200])
def test_costs_count_the_reference(family: str, name: str, d_model: int) -> None:
    values = {"dt_rank": 7, **OPTIONS[name]}
    reference = MIXERS[family](values, d_model)
    config = Mamba.Config(**values, dt_bc_norm=family == "jamba")
    assert Mamba.costs(d_model, config, length=1).parameters == sum(
        parameter.numel() for parameter in reference.parameters()
    )


# A whole model

LAYERS, VOCAB = 3, 61


def reference_model() -> MambaForCausalLM:
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=VOCAB, hidden_size=D_MODEL, num_hidden_layers=LAYERS, tie_word_embeddings=True
    )
    model = MambaForCausalLM(config).eval()
    disturb(model)
    return model


def renamed(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their parameter names as ours."""
    pairs = [
        ("backbone.embeddings.", "embedding."),
        ("backbone.layers.", "blocks."),
        ("backbone.norm_f.", "norm_f."),
        (".mixer.", ".layer."),
    ]
    result = {}
    for key, value in state_dict.items():
        for theirs, ours in pairs:
            key = key.replace(theirs, ours)
        result[key] = value
    return result


@torch.no_grad()
def test_a_whole_model_equals_the_reference(builder: Builder) -> None:
    reference = reference_model()
    layout = Layout(d_model=D_MODEL, vocab_size=VOCAB, blocks=(Block(layer="mamba"),) * LAYERS)
    model = builder.build(layout)
    model.load_state_dict(renamed(reference.state_dict()))
    tokens_BT = torch.randint(VOCAB, (2, 18))
    expected = reference(tokens_BT).logits
    assert relative(model(tokens_BT), expected) < 1e-5

    states = model.init_state(2, 18)
    logits = [model.prefill(tokens_BT[:, :10], states)]
    logits += [model.step(tokens_BT[:, t], states) for t in range(10, 18)]
    assert relative(torch.stack(logits, 1), expected[:, 9:]) < 1e-5


def test_mamba_130m_has_its_published_size(builder: Builder) -> None:
    layout = Layout(d_model=768, vocab_size=50280, blocks=(Block(layer="mamba"),) * 24)
    assert builder.costs(layout, length=1).total.parameters == 129_135_360
    assert builder.build(layout, device="meta").num_parameters == 129_135_360


# FLOPs and initial values


def test_flops_of_the_linears_are_those_that_torch_counts() -> None:
    layer, length = Mamba(64, Mamba.Config()), 40
    inner, rank, n, width = 128, 4, 16, 4
    with FlopCounterMode(display=False) as counter:
        for linear in (layer.in_proj, layer.x_proj, layer.dt_proj, layer.out_proj):
            linear(torch.randn(1, length, linear.in_features))
    linears = counter.get_total_flops()
    rest = (2 * width * inner + 9 * inner * n) * length
    assert Mamba.costs(64, layer.config, length=length).forward_flops == linears + rest
    decode = Mamba.costs(64, layer.config, length=length).decode_flops
    assert decode == linears // length + 2 * width * inner + 6 * inner * n
    assert rank == layer.rank


def test_initial_values_are_those_published() -> None:
    torch.manual_seed(0)
    layer = Mamba(512, Mamba.Config(dt_min=0.01, dt_max=0.05))
    layer.reset_parameters()
    steps = F.softplus(layer.dt_proj.bias)
    assert 0.01 * 0.999 < steps.min() < 0.0102
    assert 0.048 < steps.max() < 0.05 * 1.001
    median = steps.median().item()  # log-uniform: the geometric mean of both ends
    assert median == pytest.approx((0.01 * 0.05) ** 0.5, rel=0.1)
    torch.testing.assert_close(-layer.A_log.exp(), -torch.arange(1.0, 17).expand(1024, 16))
    assert (layer.D == 1).all()
    bound = layer.rank**-0.5
    assert 0.99 * bound < layer.dt_proj.weight.abs().max() <= bound


def test_no_initial_step_is_below_the_floor() -> None:
    layer = Mamba(64, Mamba.Config(dt_min=1e-3, dt_max=1e-2, dt_init_floor=5e-3))
    layer.reset_parameters()
    assert F.softplus(layer.dt_proj.bias).min() > 5e-3 * 0.999


def test_a_dt_rank_below_one_is_refused() -> None:
    with pytest.raises(FieldError, match=r"dt_rank: must be at least 1, got 0"):
        Mamba.check(64, Mamba.Config(dt_rank=0))
