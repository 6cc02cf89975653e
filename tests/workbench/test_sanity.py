"""The look at a model before its figures count: good layers pass, and it leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from workbench.builder import Builder
from workbench.config import NoConfig
from workbench.costs import Costs
from workbench.layer import Layer
from workbench.layout import Block, Layout
from workbench.model import HybridLM
from workbench.sanity import (
    LENGTH,
    FaultyLayerError,
    check_causality,
    check_construction,
    check_outputs,
    first_without_number,
)
from workbench.testing.toys import toy_builder, toy_layout


class Fourier(Layer):
    """A causal long convolution by FFT: exact but for rounding, which reaches back."""

    def __init__(self, d_model, config, **factory):
        super().__init__(d_model, config)
        self.kernel_DT = nn.Parameter(torch.empty(d_model, 256, **factory))

    def reset_parameters(self):
        nn.init.normal_(self.kernel_DT)

    @classmethod
    def costs(cls, d_model, config, *, length, bytes_per_element=4):
        return Costs(parameters=256 * d_model)

    def forward(self, x_BTD, context=None, state=None):
        x_BDT, length = x_BTD.transpose(1, 2), x_BTD.shape[1]
        size = 2 * length
        kernel_DF = torch.fft.rfft(self.kernel_DT[:, :length], size)
        y_BDT = torch.fft.irfft(torch.fft.rfft(x_BDT, size) * kernel_DF, size)[..., :length]
        return y_BDT.transpose(1, 2)


class Rounds(Fourier):
    """To few levels, as BitLinear does: a last bit before becomes a step after."""

    def forward(self, x_BTD, context=None, state=None):
        scale_BT1 = x_BTD.abs().amax(-1, keepdim=True) / 127
        return (x_BTD / scale_BT1).round() * scale_BT1


class Seeing(Fourier):
    """Takes a share of the last token's output."""

    share = 1e-3

    def forward(self, x_BTD, context=None, state=None):
        return x_BTD + self.share * x_BTD[:, -1:]


def model_of(*layers: type[Layer]) -> HybridLM:
    layout = Layout(d_model=32, vocab_size=64, blocks=tuple(Block(layer="x") for _ in layers))
    model = HybridLM(layout, [layer(32, NoConfig()) for layer in layers])
    torch.manual_seed(0)
    model.reset_parameters()
    return model


def test_every_built_in_layer_passes() -> None:
    builder = Builder.load()
    names = [n for n in builder.layers if builder.layers.provenance(n).package == "lm-workbench"]
    assert len(names) >= 6
    for name in names:
        blocks = (Block(layer=name), Block(layer="swiglu"), Block(layer=name))
        model = builder.build(Layout(d_model=128, vocab_size=100, blocks=blocks))
        check_outputs(model)
        check_causality(model)


def test_rounding_is_no_leak() -> None:
    """Nor what a coarse layer after it makes of it."""
    model = model_of(Fourier, Rounds, Fourier, Rounds)
    before = torch.zeros(1, LENGTH, dtype=torch.long)
    after = before.clone()
    after[:, -1] = 1
    assert not torch.equal(model(before)[:, 0], model(after)[:, 0]), "rounding reaches back"
    check_outputs(model)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_small_leak_is_found_and_its_block_named(at: int) -> None:
    layers: list[type[Layer]] = [Rounds, Rounds, Rounds]
    layers[at] = Seeing
    with pytest.raises(FaultyLayerError, match=rf"^blocks\[{at}\] \(x\) leaks the future"):
        check_outputs(model_of(*layers))


def test_the_last_token_may_be_all_there_is() -> None:
    for length in (1, 2, 3):
        check_outputs(model_of(Rounds, Fourier), length)
    with pytest.raises(FaultyLayerError, match="leaks"):
        check_outputs(model_of(Seeing), 3)


def test_a_model_that_diverged_is_not_called_leaky() -> None:
    model = model_of(Rounds, Fourier)
    with torch.no_grad():
        model.layers[1].kernel_DT.fill_(float("nan"))  # type: ignore[union-attr]
    check_causality(model)
    with pytest.raises(FaultyLayerError, match=r"^blocks\[1\] \(x\) returns NaN"):
        check_outputs(model)
    assert first_without_number(model).startswith("blocks[1] (x) returns NaN")


def test_who_only_passes_nan_on_is_not_blamed() -> None:
    model = model_of(Rounds, Rounds)
    with torch.no_grad():
        model.embedding.weight.fill_(float("nan"))
    assert first_without_number(model) == ""


@pytest.mark.parametrize("training", [True, False])
def test_it_leaves_no_trace(training: bool) -> None:
    model = toy_builder().build(toy_layout()).train(training)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    faulty = model_of(Seeing)
    generator = torch.get_rng_state()
    check_outputs(model)
    check_causality(model)
    with pytest.raises(FaultyLayerError):
        check_outputs(faulty)
    assert first_without_number(model) == ""
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_on_the_meta_device_has_allocated_nothing() -> None:
    check_construction(toy_builder().build(toy_layout(), device="meta"))
    with pytest.raises(FaultyLayerError, match=r"blocks\[0\] \(x\) allocates 'kernel_DT' on cpu"):
        check_construction(model_of(Fourier))
