"""Mamba-2 against transformers' Mamba2, Granite and Nemotron-H mixers with the same weights.

Shape suffixes: B batch, T tokens, D d_model, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import GraniteMoeHybridConfig, Mamba2Config, Mamba2ForCausalLM, NemotronHConfig
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
    GraniteMoeHybridMambaLayer,
)
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer, MambaRMSNormGated
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from workbench.builder import Builder, default_builder
from workbench.errors import FieldError
from workbench.layer import Context
from workbench.layout import Block, Layout
from workbench_mamba.bitlinear import BitLinear
from workbench_mamba.common import is_plain
from workbench_mamba.mamba2 import Mamba2

D_MODEL = 32
SMALL: dict[str, Any] = {"d_state": 16, "headdim": 16, "chunk_size": 8}
OPTIONS: dict[str, dict[str, Any]] = {
    "one group": SMALL,
    "groups": SMALL | {"n_groups": 2, "grouped_norm": True},
    "biases": SMALL | {"bias": True, "conv_bias": False, "d_conv": 3},
    "limits": SMALL | {"dt_limit_min": 0.01, "dt_limit_max": 0.05},
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


def mamba2_config(config: Any, d_model: int = D_MODEL, **others: Any) -> Mamba2Config:
    limit = config.dt_limit_max
    return Mamba2Config(
        hidden_size=d_model,
        state_size=config.d_state,
        conv_kernel=config.d_conv,
        expand=config.expand,
        head_dim=config.headdim,
        num_heads=config.heads(d_model),
        n_groups=config.n_groups,
        chunk_size=config.chunk_size,
        use_bias=config.bias,
        use_conv_bias=config.conv_bias,
        time_step_limit=(config.dt_limit_min, float("inf") if limit is None else limit),
        **others,
    )


def granite(config: Any) -> nn.Module:
    theirs = GraniteMoeHybridConfig(
        hidden_size=D_MODEL,
        num_hidden_layers=1,
        layer_types=["mamba"],
        mamba_d_state=config.d_state,
        mamba_d_head=config.headdim,
        mamba_n_heads=config.heads(D_MODEL),
        mamba_n_groups=config.n_groups,
        mamba_chunk_size=config.chunk_size,
        rms_norm_eps=config.norm_eps,
    )
    return GraniteMoeHybridMambaLayer(theirs, layer_idx=0)


def nemotron(config: Any) -> nn.Module:
    theirs = NemotronHConfig(
        hidden_size=D_MODEL,
        layers_block_type=["mamba"],
        ssm_state_size=config.d_state,
        mamba_head_dim=config.headdim,
        mamba_num_heads=config.heads(D_MODEL),
        n_groups=config.n_groups,
        chunk_size=config.chunk_size,
        layer_norm_epsilon=config.norm_eps,
        time_step_min=1e-30,
    )
    return NemotronHMamba2Mixer(theirs, layer_idx=0)


def pair(reference: nn.Module, config: Any) -> tuple[Mamba2, nn.Module]:
    """Our layer and theirs, one state dict."""
    disturb(reference)
    layer = Mamba2(D_MODEL, config)
    layer.load_state_dict(reference.state_dict())
    return layer, reference.eval()


def assert_outputs_and_gradients_equal(layer: Mamba2, reference: nn.Module) -> None:
    x_BTD, weights_BTD = torch.randn(2, 21, D_MODEL), torch.randn(2, 21, D_MODEL)
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


@pytest.mark.parametrize("name", list(OPTIONS))
def test_outputs_and_gradients_equal_mamba2(name: str) -> None:
    torch.manual_seed(0)
    config = Mamba2.Config(**OPTIONS[name])
    layer, reference = pair(Mamba2Mixer(mamba2_config(config), layer_idx=0), config)
    assert_outputs_and_gradients_equal(layer, reference)


def test_an_ungrouped_norm_spans_all_groups() -> None:
    torch.manual_seed(0)
    config = Mamba2.Config(**SMALL, n_groups=2, grouped_norm=False)
    reference = Mamba2Mixer(mamba2_config(config), layer_idx=0)
    inner = config.d_inner(D_MODEL)
    reference.norm = MambaRMSNormGated(inner, group_size=inner, eps=config.norm_eps)
    assert_outputs_and_gradients_equal(*pair(reference, config))


@pytest.mark.parametrize("family", [granite, nemotron])
def test_outputs_and_gradients_equal_the_hybrids(family: Any) -> None:
    torch.manual_seed(0)
    config = Mamba2.Config(**SMALL, n_groups=2, grouped_norm=True)
    assert_outputs_and_gradients_equal(*pair(family(config), config))


def test_num_heads_sets_the_width_whatever_expand_is() -> None:
    torch.manual_seed(0)
    config = Mamba2.Config(**SMALL, num_heads=3)
    assert config.d_inner(D_MODEL) == 48 != config.expand * D_MODEL
    assert_outputs_and_gradients_equal(*pair(nemotron(config), config))


@torch.no_grad()
def test_left_padding_equals_the_reference() -> None:
    torch.manual_seed(0)
    config = Mamba2.Config(**SMALL)
    layer, reference = pair(Mamba2Mixer(mamba2_config(config), layer_idx=0), config)
    x_BTD = torch.randn(2, 15, D_MODEL)
    mask_BT = torch.arange(15) >= torch.tensor([[0], [6]])
    expected = reference(x_BTD, attention_mask=mask_BT.long())
    actual = layer(x_BTD, Context(attention_mask_BT=mask_BT))
    assert relative(actual[mask_BT], expected[mask_BT]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("chunk_size", [1, 5, 16, 64])
def test_the_chunk_size_does_not_change_results(chunk_size: int) -> None:
    torch.manual_seed(0)
    config = Mamba2.Config(**SMALL)
    layer = Mamba2(D_MODEL, config)
    layer.reset_parameters()
    other = Mamba2(D_MODEL, dataclasses.replace(config, chunk_size=chunk_size))
    other.load_state_dict(layer.state_dict())
    x_BTD = torch.randn(2, 37, D_MODEL)
    assert relative(other(x_BTD), layer(x_BTD)) < 1e-5


# A whole model

LAYERS, VOCAB = 3, 61


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
@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model_equals_the_reference(builder: Builder, tied: bool) -> None:
    torch.manual_seed(0)
    values = OPTIONS["groups"]
    config = mamba2_config(
        Mamba2.Config(**values),
        vocab_size=VOCAB,
        num_hidden_layers=LAYERS,
        tie_word_embeddings=tied,
    )
    reference = Mamba2ForCausalLM(config).eval()
    disturb(reference)
    blocks = (Block(layer="mamba2", config=values),) * LAYERS
    layout = Layout(d_model=D_MODEL, vocab_size=VOCAB, blocks=blocks, tie_embeddings=tied)
    model = builder.build(layout)
    model.load_state_dict(renamed(reference.state_dict()))
    assert model.num_parameters == reference.num_parameters()
    tokens_BT = torch.randint(VOCAB, (2, 30))
    expected = reference(tokens_BT).logits
    assert relative(model(tokens_BT), expected) < 1e-5

    states = model.init_state(2, 30)
    logits = [model(tokens_BT[:, :9], states=states), model(tokens_BT[:, 9:20], states=states)]
    logits += [model.step(tokens_BT[:, t], states)[:, None] for t in range(20, 30)]
    assert relative(torch.cat(logits, 1), expected) < 1e-5


def test_mamba2_130m_has_its_published_size(builder: Builder) -> None:
    blocks = (Block(layer="mamba2", config={"d_state": 128, "headdim": 64}),) * 24
    layout = Layout(d_model=768, vocab_size=50288, blocks=blocks)
    assert builder.costs(layout, length=1).total.parameters == 128_989_632
    assert builder.build(layout, device="meta").num_parameters == 128_989_632


# FLOPs and initial values


@torch.no_grad()
@pytest.mark.parametrize("name", list(OPTIONS))
def test_flops_are_those_that_torch_counts(name: str) -> None:
    config, length = Mamba2.Config(**OPTIONS[name]), 40
    layer = Mamba2(D_MODEL, config)
    layer.reset_parameters()
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(1, length, D_MODEL))
    inner, shared = config.d_inner(D_MODEL), config.n_groups * config.d_state
    # Not matrix products, so torch does not count the convolution, nor any of a decode step's core.
    convolution = 2 * config.d_conv * (inner + 2 * shared)
    costs = Mamba2.costs(D_MODEL, config, length=length)
    assert costs.forward_flops == counter.get_total_flops() + convolution * length
    linears = 2 * (layer.in_proj.weight.numel() + layer.out_proj.weight.numel())
    assert costs.decode_flops == linears + convolution + 5 * inner * config.d_state


def test_initial_values_are_those_published() -> None:
    torch.manual_seed(0)
    config = Mamba2.Config(headdim=1, d_state=16, dt_min=0.01, dt_max=0.05)
    layer = Mamba2(512, config)
    layer.reset_parameters()
    steps = F.softplus(layer.dt_bias)
    assert 0.01 * 0.999 < steps.min() < 0.0102
    assert 0.048 < steps.max() < 0.05 * 1.001
    assert steps.median().item() == pytest.approx((0.01 * 0.05) ** 0.5, rel=0.1)
    decay = layer.A_log.exp()  # uniform in [1, 16]
    assert 1 <= decay.min() < 1.1
    assert 15.9 < decay.max() <= 16.0001
    assert decay.mean().item() == pytest.approx(8.5, rel=0.05)
    assert (layer.D == 1).all()
    assert (layer.norm.weight == 1).all()


# Bad configurations


@pytest.mark.parametrize(
    ("field", "values", "d_model"),
    [
        ("headdim", {"headdim": 48}, 256),
        ("headdim", {"headdim": 64}, 24),
        ("headdim", {"headdim": 1024}, 256),
        ("n_groups", {"n_groups": 3}, 256),
        ("n_groups", {"n_groups": 4, "num_heads": 6}, 256),
        ("n_groups", {"n_groups": 16}, 256),
    ],
)
def test_what_does_not_divide_is_refused_with_a_value_that_works(
    field: str, values: dict[str, int], d_model: int
) -> None:
    with pytest.raises(FieldError) as error:
        Mamba2.check(d_model, Mamba2.Config(**values))
    assert error.value.field == field
    works = re.search(r": (\d+) does", error.value.message)
    assert works is not None
    Mamba2.check(d_model, Mamba2.Config(**{**values, field: int(works.group(1))}))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("num_heads", {"num_heads": 0}),
        ("headdim", {"headdim": 0}),
        ("n_groups", {"n_groups": 0}),
        ("chunk_size", {"chunk_size": 0}),
        ("dt_limit_min", {"dt_limit_min": -0.1}),
        ("dt_limit_max", {"dt_limit_min": 0.1, "dt_limit_max": 0.1}),
    ],
)
def test_impossible_values_are_refused_by_field(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(FieldError) as error:
        Mamba2.check(64, Mamba2.Config(**values))
    assert error.value.field == field


def test_a_linear_is_plain_unless_something_more_than_its_product_is_wanted():
    assert is_plain(nn.Linear(4, 4, bias=False))
    watched = nn.Linear(4, 4, bias=False)
    watched.register_forward_hook(lambda *_: None)
    adapted = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4, bias=False))
    assert not any(map(is_plain, (nn.Linear(4, 4), watched, adapted, BitLinear(4, 4, bias=False))))
