"""LayerContract passes on honest layers, and each of its tests finds the fault it is there for."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated

import pytest
import torch
from torch import nn

from tests.workbench.testing.running import failure
from workbench.config import Choice, NoConfig, Range
from workbench.errors import FieldError
from workbench.layer import PLAIN, Layer, State
from workbench.testing import LayerContract
from workbench.testing.toys import ToyMixer, ToyMLP, ToyState


class TestToyMixer(LayerContract):
    layer = ToyMixer
    configs = (ToyMixer.Config(), ToyMixer.Config(expand=2))


class TestToyMLP(LayerContract):
    layer = ToyMLP
    configs = (NoConfig(),)


class Peeks(ToyMixer):
    def forward(self, x_BTD, context=PLAIN, state=None):
        return super().forward(x_BTD, context, state) + 1e-6 * x_BTD.mean(1, keepdim=True)


class SeesOnlyThePast(ToyMixer):
    def forward(self, x_BTD, context=PLAIN, state=None):
        return super().forward(x_BTD.roll(1, dims=1), context, state)


class StepForgetsBias(ToyMixer):
    def step(self, x_BD, state, context=PLAIN):
        bias = self.in_proj.bias
        self.in_proj.bias = None
        try:
            return super().step(x_BD, state)
        finally:
            self.in_proj.bias = bias


class PrefillForgetsState(ToyMixer):
    def forward(self, x_BTD, context=PLAIN, state=None):
        return super().forward(x_BTD, context, state if x_BTD.shape[1] == 1 else None)


class SharingState(State):
    def __init__(self, average_BI):
        self.average_BI = average_BI

    def tensors(self):
        return {"average_BI": self.average_BI}

    def select(self, indices_B):
        return (
            self
            if len(indices_B) == len(self.average_BI)
            else SharingState(self.average_BI[:1].expand(len(indices_B), -1))
        )


class SelectTakesTheFirst(ToyMixer):
    def init_state(self, batch_size, max_length, **factory):
        return SharingState(super().init_state(batch_size, max_length, **factory).average_BI)


class TakesInPadding(ToyMixer):
    def forward(self, x_BTD, context=PLAIN, state=None):
        context = dataclasses.replace(context, attention_mask_BT=None)
        return super().forward(x_BTD, context, state)


class MasksBeforeTheBias(ToyMixer):
    def forward(self, x_BTD, context=PLAIN, state=None):
        x_BTD = context.mask_padding(x_BTD)
        context = dataclasses.replace(context, attention_mask_BT=None)
        return super().forward(x_BTD, context, state)


class DividesByWhatItSees(ToyMixer):
    def forward(self, x_BTD, context=PLAIN, state=None):
        y_BTD = super().forward(x_BTD, context, state)
        if context.attention_mask_BT is not None:
            seen_BT1 = context.attention_mask_BT.cumsum(1)[..., None]
            y_BTD = y_BTD * seen_BT1 / seen_BT1
        return y_BTD


class MixesDocuments(ToyMixer):
    def forward(self, x_BTD, context=PLAIN, state=None):
        context = dataclasses.replace(context, seq_idx_BT=None)
        return super().forward(x_BTD, context, state)


class ContinuesEveryDocument(ToyMixer):
    """Knows borders inside a call, but adds the state to every document of it."""

    def forward(self, x_BTD, context=PLAIN, state=None):
        if state is None or context.seq_idx_BT is None:
            return super().forward(x_BTD, context, state)
        bonus_B1D = self.out_proj(state.average_BI)[:, None]
        return super().forward(x_BTD, context, state) + 1e-6 * bonus_B1D


class LeaksGradientsAcrossDocuments(ToyMixer):
    """Right outputs; the backward of a fused scan that forgets the borders."""

    def forward(self, x_BTD, context=PLAIN, state=None):
        leak_BTD = 1e-3 * x_BTD.cumsum(1)
        return super().forward(x_BTD, context, state) + leak_BTD - leak_BTD.detach()


class ReadsThePrefix(ToyMixer):
    def forward(self, x_BTD, context=PLAIN, state=None):
        y_BTD = super().forward(x_BTD, context, state)
        return y_BTD if context.prefix_lengths_B is None else y_BTD + x_BTD[:, :5].mean(1)[:, None]


class CausalInItsPrefix(ToyMixer):
    kind = "attention"


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1.01


class WrongGradient(ToyMixer):
    def forward(self, x_BTD, context=PLAIN, state=None):
        return Scaled.apply(super().forward(x_BTD, context, state))


class NoGradient(ToyMixer):
    def __init__(self, d_model, config, **factory):
        super().__init__(d_model, config, **factory)
        self.idle = nn.Parameter(torch.empty(3, **factory))

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.zeros_(self.idle)


class RoundsToHalf(ToyMixer):
    def forward(self, x_BTD, context=PLAIN, state=None):
        y_BTD = super().forward(x_BTD, context, state)
        return y_BTD if y_BTD.dtype == torch.float64 else y_BTD.bfloat16().to(y_BTD.dtype)


class AnswersInFloat32(ToyMixer):
    def forward(self, x_BTD, context=PLAIN, state=None):
        y_BTD = super().forward(x_BTD, context, state)
        return y_BTD if y_BTD.dtype == torch.float64 else y_BTD.float()


class Noisy(ToyMixer):
    def forward(self, x_BTD, context=PLAIN, state=None):
        noise = 1e-12 * torch.rand((), dtype=x_BTD.dtype)
        return super().forward(x_BTD, context, state) * (1 + noise)


class ForgetsABuffer(ToyMixer):
    """Draws a buffer that state dicts do not hold."""

    def __init__(self, d_model, config, **factory):
        super().__init__(d_model, config, **factory)
        self.register_buffer("scale", torch.empty(d_model, **factory), persistent=False)

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.uniform_(self.scale)

    def forward(self, x_BTD, context=PLAIN, state=None):
        return super().forward(x_BTD, context, state) * self.scale


class InitialisesInItsConstructor(ToyMixer):
    def __init__(self, d_model, config, **factory):
        super().__init__(d_model, config, **factory)
        nn.init.ones_(self.decay_I)

    def reset_parameters(self):
        pass


class ComputesInItsConstructor(ToyMixer):
    def __init__(self, d_model, config, **factory):
        super().__init__(d_model, config, **factory)
        self.angles = torch.arange(d_model)


class CountsWrongly(ToyMixer):
    @classmethod
    def costs(cls, d_model, config, *, length, bytes_per_element=4):
        exact = super().costs(d_model, config, length=length, bytes_per_element=bytes_per_element)
        return dataclasses.replace(exact, **cls.change(exact, length))


class ForgetsTheBiasInCosts(CountsWrongly):
    @staticmethod
    def change(exact, length):
        return {"parameters": exact.parameters - 64, "active_parameters": 0}


class CountsStateInFloat32(CountsWrongly):
    @classmethod
    def costs(cls, d_model, config, *, length, bytes_per_element=4):
        return ToyMixer.costs(d_model, config, length=length)


class CountsHalfTheFlops(CountsWrongly):
    @staticmethod
    def change(exact, length):
        return {"forward_flops": exact.forward_flops // 2}


@dataclasses.dataclass
class Diary(ToyState):
    seen_BTD: torch.Tensor


class GrowsItsState(ToyMixer):
    def init_state(self, batch_size, max_length, **factory):
        state = super().init_state(batch_size, max_length, **factory)
        return Diary(state.average_BI, torch.empty(batch_size, 0, self.d_model, **factory))

    def forward(self, x_BTD, context=PLAIN, state=None):
        if state is not None:
            state.seen_BTD = torch.cat([state.seen_BTD, x_BTD], dim=1)
        return super().forward(x_BTD, context, state)


class BoundlessRecurrence(ToyMixer):
    def init_state(self, batch_size, max_length, **factory):
        state = super().init_state(batch_size, max_length, **factory)
        state.average_BI = state.average_BI.repeat(1, max_length)
        return state

    @classmethod
    def costs(cls, d_model, config, *, length, bytes_per_element=4):
        exact = super().costs(d_model, config, length=length, bytes_per_element=bytes_per_element)
        return dataclasses.replace(exact, state_bytes=exact.state_bytes * length)


class RefusesWithoutAField(ToyMixer):
    @classmethod
    def check(cls, d_model, config):
        if config.expand != 1:
            raise FieldError("d_inner", "is too large")


class OffersTheImpossible(ToyMixer):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        expand: Annotated[int, Range(1, 3), "inner width"] = 1

    def __init__(self, d_model, config, **factory):
        if config.expand == 3:
            raise RuntimeError("shapes do not fit")
        super().__init__(d_model, config, **factory)


class OffersAnotherType(ToyMixer):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        expand: Annotated[int, Choice(1, "two"), "inner width"] = 1


class NoPlainData(ToyMixer):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        expand: int = 1
        limit: float = math.inf


class MisspellsPrecision(ToyMixer):
    keep_precision = {"gate": "its name is gate_proj"}  # noqa: RUF012


class MisspellsProjection(ToyMixer):
    output_projection = "o_proj"


class NoGlyph(ToyMixer):
    glyph = "?"


FAULTS: list[tuple[type[Layer], str]] = [
    (Peeks, "test_causality"),
    (SeesOnlyThePast, "test_causality"),
    (StepForgetsBias, "test_prefill_and_steps_equal_forward"),
    (StepForgetsBias, "test_steps_continue_a_prefill"),
    (PrefillForgetsState, "test_prefill_and_steps_equal_forward"),
    (PrefillForgetsState, "test_steps_continue_a_prefill"),
    (SelectTakesTheFirst, "test_selected_states_go_their_own_way"),
    (TakesInPadding, "test_left_padding_leaks_nothing"),
    (MasksBeforeTheBias, "test_left_padding_leaks_nothing"),
    (DividesByWhatItSees, "test_padding_stays_finite"),
    (MixesDocuments, "test_documents_of_a_packed_row_are_strangers"),
    (LeaksGradientsAcrossDocuments, "test_documents_of_a_packed_row_are_strangers"),
    (ContinuesEveryDocument, "test_a_state_belongs_to_one_document"),
    (ReadsThePrefix, "test_prefix"),
    (CausalInItsPrefix, "test_prefix"),
    (WrongGradient, "test_gradients"),
    (NoGradient, "test_gradients"),
    (RoundsToHalf, "test_float32"),
    (AnswersInFloat32, "test_bfloat16"),
    (Noisy, "test_determinism"),
    (ForgetsABuffer, "test_save_and_load"),
    (InitialisesInItsConstructor, "test_reset_parameters_needs_no_constructor"),
    (ComputesInItsConstructor, "test_meta_device_allocates_nothing"),
    (ForgetsTheBiasInCosts, "test_costs_count_parameters"),
    (CountsStateInFloat32, "test_costs_count_state_bytes"),
    (CountsHalfTheFlops, "test_costs_are_plausible"),
    (BoundlessRecurrence, "test_costs_are_plausible"),
    (GrowsItsState, "test_states_do_not_grow"),
    (RefusesWithoutAField, "test_search_ranges"),
    (OffersTheImpossible, "test_search_ranges"),
    (OffersAnotherType, "test_search_ranges"),
    (NoPlainData, "test_config_is_plain_data"),
    (MisspellsPrecision, "test_keep_precision_names_submodules"),
    (MisspellsProjection, "test_output_projection"),
    (NoGlyph, "test_class_attributes"),
]

RAISES = {
    OffersTheImpossible: "RuntimeError",
    OffersAnotherType: "FieldError",
    NoPlainData: "ValueError",
    MisspellsProjection: "AttributeError",
}


@pytest.mark.parametrize(
    ("layer", "test"), FAULTS, ids=[f"{layer.__name__}-{test[5:]}" for layer, test in FAULTS]
)
def test_each_fault_is_found(layer: type[Layer], test: str, tmp_path: Path) -> None:
    message = failure(LayerContract, test, tmp_path, layer=layer, configs=(layer.Config(),))
    assert message.startswith(RAISES.get(layer, "AssertionError"))


def test_straight_through_gradients_are_not_held_against_differences(tmp_path: Path) -> None:
    attributes = {"layer": WrongGradient, "configs": (ToyMixer.Config(),)}
    strict, lenient = (
        failure(
            LayerContract,
            "test_gradients",
            tmp_path / str(flag),
            straight_through=flag,
            **attributes,
        )
        for flag in (False, True)
    )
    assert strict
    assert not lenient


def test_a_suite_without_configs_says_so() -> None:
    class Metafunc:
        fixturenames = ("config",)

    class Unfinished(LayerContract):
        layer = ToyMixer

    with pytest.raises(pytest.UsageError, match="Unfinished must set `configs`"):
        Unfinished().pytest_generate_tests(Metafunc())
