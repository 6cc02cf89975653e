"""What holds for every Mamba layer beyond the contract suite, which each runs in its own file.

Shape suffixes: B batch, T tokens, D d_model.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workbench.errors import FieldError
from workbench.layer import Context, Layer, State
from workbench_mamba.bitlinear_mamba import BitLinearMamba
from workbench_mamba.mamba import Mamba, MambaState
from workbench_mamba.mamba2 import Mamba2

D_MODEL = 32
LAYERS: dict[str, tuple[type[Layer], dict[str, Any]]] = {
    "mamba": (Mamba, {}),
    "mamba, all options": (
        Mamba,
        {"dt_bc_norm": True, "bias": True, "conv_bias": False, "dt_rank": 5, "d_conv": 3},
    ),
    "mamba2": (Mamba2, {"d_state": 16, "headdim": 16, "chunk_size": 8}),
    "mamba2, all options": (
        Mamba2,
        {
            "d_state": 8,
            "headdim": 12,
            "num_heads": 4,
            "n_groups": 2,
            "grouped_norm": True,
            "bias": True,
            "conv_bias": False,
            "d_conv": 2,
            "chunk_size": 16,
            "dt_limit_min": 0.01,
            "dt_limit_max": 0.05,
        },
    ),
    "bitlinear_mamba": (BitLinearMamba, {}),
    "bitlinear_mamba, all options": (
        BitLinearMamba,
        {"bit_x_proj": True, "bit_dt_proj": True, "dt_bc_norm": True, "bias": True},
    ),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def build(name: str, dtype: torch.dtype | None = None, device: str = "cpu") -> Layer:
    layer_class, values = LAYERS[name]
    config = layer_class.Config(**values)
    layer_class.check(D_MODEL, config)
    torch.manual_seed(0)
    layer = layer_class(D_MODEL, config, device=device, dtype=dtype)
    if device != "meta":
        layer.reset_parameters()
        with torch.no_grad():  # so that no parameter is neutral
            for parameter in layer.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return layer


@pytest.fixture(params=list(LAYERS))
def layer(request: pytest.FixtureRequest) -> Layer:
    return build(request.param)


def inputs(length: int, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, D_MODEL, generator=torch.Generator().manual_seed(seed))


def assert_close(actual: Tensor, expected: Tensor, layer: Layer) -> None:
    """Within 1e-5 of the largest value; 2e-2 where a rounding of activations may flip."""
    tolerance = 2e-2 if isinstance(layer, BitLinearMamba) else 1e-5
    difference = (actual - expected).abs().max() / expected.abs().max()
    assert difference <= tolerance


def assert_states_close(actual: State, expected: State, layer: Layer) -> None:
    for name, tensor in expected.tensors().items():
        assert_close(actual.tensors()[name], tensor, layer)


# Decoding


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[1, 2, 21], [8, 16], [3, 4, 17]], ids=str)
def test_a_prompt_may_come_in_several_calls(layer: Layer, cuts: list[int]) -> None:
    x_BTD = inputs(24)
    whole, pieces = layer.init_state(2, 24), layer.init_state(2, 24)
    expected = layer(x_BTD, state=whole)
    actual = torch.cat([layer(part, state=pieces) for part in x_BTD.split(_lengths(cuts), 1)], 1)
    assert_close(actual, expected, layer)
    assert_states_close(pieces, whole, layer)


def _lengths(cuts: list[int]) -> list[int]:
    return [end - begin for begin, end in zip([0, *cuts], [*cuts, 24], strict=True)]


@torch.no_grad()
def test_the_state_is_updated_in_place(layer: Layer) -> None:
    state = layer.init_state(2, 8)
    held = state.tensors()
    layer(inputs(5), state=state)
    layer.step(inputs(1)[:, 0], state)
    for name, tensor in state.tensors().items():
        assert tensor is held[name]
        assert tensor.abs().max() > 0


# Nothing leaks


@torch.no_grad()
def test_left_padding_leaks_nothing(layer: Layer) -> None:
    padding = 5
    x_BTD = inputs(17)
    padded_BTD = torch.cat([100 * inputs(padding, seed=2), x_BTD], 1)
    mask_BT = torch.arange(padding + 17).expand(2, -1) >= padding
    state, padded_state = layer.init_state(2, 32), layer.init_state(2, 32)
    expected = layer(x_BTD, state=state)
    actual = layer(padded_BTD, Context(attention_mask_BT=mask_BT), padded_state)
    assert_close(actual[:, padding:], expected, layer)
    assert actual.isfinite().all()
    assert_states_close(padded_state, state, layer)
    token_BD = inputs(1, seed=3)[:, 0]
    assert_close(layer.step(token_BD, padded_state), layer.step(token_BD, state), layer)


@torch.no_grad()
def test_padding_longer_than_a_call_leaks_nothing(layer: Layer) -> None:
    x_BTD = inputs(7)
    state, padded_state = layer.init_state(2, 16), layer.init_state(2, 16)
    padding_BT = torch.zeros(2, 6, dtype=torch.bool)
    layer(100 * inputs(6, seed=2), Context(attention_mask_BT=padding_BT), padded_state)
    assert all(tensor.abs().max() == 0 for tensor in padded_state.tensors().values())
    assert_close(layer(x_BTD, state=padded_state), layer(x_BTD, state=state), layer)


@torch.no_grad()
def test_right_padding_changes_neither_outputs_nor_the_recurrence(layer: Layer) -> None:
    x_BTD = inputs(11)
    padded_BTD = torch.cat([x_BTD, 100 * inputs(6, seed=2)], 1)
    mask_BT = torch.arange(17).expand(2, -1) < 11
    state, padded_state = layer.init_state(2, 32), layer.init_state(2, 32)
    expected = layer(x_BTD, state=state)
    actual = layer(padded_BTD, Context(attention_mask_BT=mask_BT), padded_state)
    assert_close(actual[:, :11], expected, layer)
    recurrent = next(name for name in state.tensors() if name.startswith("ssm"))
    assert_close(padded_state.tensors()[recurrent], state.tensors()[recurrent], layer)


@torch.no_grad()
def test_packed_documents_equal_separate_ones(layer: Layer) -> None:
    lengths = [1, 2, 9, 5]
    documents = [inputs(length, seed=length) for length in lengths]
    seq_idx = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).int().expand(2, -1)
    packed_state = layer.init_state(2, 32)
    packed = layer(torch.cat(documents, 1), Context(seq_idx_BT=seq_idx), packed_state)
    for actual, document in zip(packed.split(lengths, 1), documents, strict=True):
        state = layer.init_state(2, 32)
        assert_close(actual, layer(document, state=state), layer)
    assert_states_close(packed_state, state, layer)


@torch.no_grad()
def test_a_state_belongs_to_the_first_document_of_a_call(layer: Layer) -> None:
    first, rest, other = inputs(6), inputs(3, seed=2), inputs(4, seed=3)
    state = layer.init_state(2, 32)
    layer(first, state=state)
    seq_idx = torch.tensor([[0] * 3 + [1] * 4] * 2, dtype=torch.int32)
    actual = layer(torch.cat([rest, other], 1), Context(seq_idx_BT=seq_idx), state)
    assert_close(actual[:, :3], layer(torch.cat([first, rest], 1))[:, 6:], layer)
    assert_close(actual[:, 3:], layer(other), layer)


# Precision


@torch.no_grad()
@pytest.mark.parametrize("name", list(LAYERS))
def test_bfloat16_stays_near_float32(name: str) -> None:
    half = build(name, torch.bfloat16)
    full = build(name)
    full.load_state_dict(half.state_dict())
    x_BTD = inputs(24).bfloat16()
    expected = full(x_BTD.float())
    state = half.init_state(2, 24)
    actual = [half(x_BTD[:, :20], state=state)]
    actual += [half.step(x_BTD[:, t], state)[:, None] for t in range(20, 24)]
    assert all(part.dtype == torch.bfloat16 for part in actual)
    difference = torch.cat(actual, 1).float() - expected
    # A rounding flip in 8-bit activations adds a level, 0.8 % of a token's largest value.
    tolerance = 5e-2 if name.startswith("bitlinear") else 3e-2
    assert difference.square().mean().sqrt() / expected.square().mean().sqrt() < tolerance


def test_autocast_stays_near_float32(layer: Layer) -> None:
    x_BTD = inputs(24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = layer(x_BTD)
        actual.float().square().sum().backward()
        with torch.no_grad():
            state = layer.init_state(2, 24)
            parts = [layer(x_BTD[:, :20], state=state)]
            parts += [layer.step(x_BTD[:, t], state)[:, None] for t in range(20, 24)]
    expected = layer(x_BTD).detach()
    tolerance = 5e-2 if isinstance(layer, BitLinearMamba) else 3e-2
    for outputs in (actual, torch.cat(parts, 1)):
        difference = outputs.detach().float() - expected
        assert difference.norm() / expected.norm() < tolerance
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


# Projections and states


def test_a_replaced_projection_is_called(layer: Layer) -> None:
    """Quantizers swap projections for modules that are no nn.Linear."""

    class Counting(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.inner(x)

    names = [
        name
        for name, module in layer.named_children()
        if isinstance(module, nn.Linear) and name not in layer.keep_precision
    ]
    assert {"in_proj", "out_proj"} <= set(names)
    for name in names:
        setattr(layer, name, Counting(layer.get_submodule(name)))
    layer(inputs(3))
    layer.step(inputs(1)[:, 0], layer.init_state(2, 4))
    assert all(layer.get_submodule(name).calls == 2 for name in names)


def test_the_recurrence_keeps_its_state_in_float32() -> None:
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        state = build("mamba", dtype).init_state(3, 8)
        assert isinstance(state, MambaState)
        assert (state.conv_BCW.shape, state.conv_BCW.dtype) == ((3, 64, 4), dtype)
        assert (state.ssm_BCN.shape, state.ssm_BCN.dtype) == ((3, 64, 16), kept)


# Bad configurations


@pytest.mark.parametrize("layer_class", [Mamba, Mamba2, BitLinearMamba])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("d_state", 0),
        ("expand", 0),
        ("d_conv", 5),
        ("d_conv", 1),
        ("norm_eps", 0.0),
        ("dt_min", 0.0),
        ("dt_max", 1e-4),
        ("dt_init_floor", 0.0),
    ],
)
def test_impossible_values_are_refused_by_field(
    layer_class: type[Layer], field: str, value: float
) -> None:
    layer_class.check(64, layer_class.Config())
    config = dataclasses.replace(layer_class.Config(), **{field: value})
    with pytest.raises(FieldError) as error:
        layer_class.check(64, config)
    assert error.value.field == field
    assert str(value) in error.value.message
