"""Which decode steps a CUDA graph could replay, and what is said of the others."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from tests.workbench.conftest import TOYS
from workbench import Block, Layout, WorkbenchError
from workbench.builder import Builder
from workbench.decoding import (
    CapturedStep,
    Places,
    captured_or_eager,
    require_room,
    why_not_captured,
    why_not_static,
)
from workbench.generation import generate, stream
from workbench.layer import State
from workbench.measuring import decode_time

WIDTH = 64


@pytest.fixture(scope="module")
def builder():
    return Builder.load([TOYS])


def build(builder, *layers):
    blocks = tuple(Block(layer=name) for name in layers)
    return builder.build(Layout(d_model=WIDTH, vocab_size=16, blocks=blocks), seed=0).eval()


def prompt(length=5):
    return torch.randint(16, (2, length), generator=torch.Generator().manual_seed(0))


def filled(model, tokens=8):
    states = model.init_state(2, 5 + tokens)
    with torch.inference_mode():
        model.prefill(prompt(), states)
    return states


def test_a_cpu_captures_nothing_and_says_so(builder):
    model = build(builder, "swiglu")
    assert why_not_captured(model, filled(model)) == "CUDA graphs need a CUDA device"
    with pytest.raises(WorkbenchError, match="captured as a CUDA graph: CUDA graphs need"):
        CapturedStep(model, filled(model), 2)
    with pytest.raises(WorkbenchError, match="CUDA graphs need a CUDA device"):
        next(stream(model, prompt(), 4, capture=True))
    with pytest.raises(WorkbenchError, match="CUDA graphs need a CUDA device"):
        generate(model, prompt(), 4, capture=True)


@torch.inference_mode()
def test_where_nothing_can_be_captured_steps_are_the_models(builder):
    model = build(builder, "mamba", "attention")
    ours, theirs = filled(model), filled(model)
    step = captured_or_eager(model, ours, 2)
    for tokens_B in prompt().unbind(1):
        assert torch.equal(step(tokens_B), model.step(tokens_B, theirs))


@pytest.mark.parametrize("layer", ["mamba", "mamba2", "attention", "swiglu", "relu2_mlp"])
def test_built_in_layers_work_on_tensors_alone(builder, layer):
    model = build(builder, layer, layer)
    states = filled(model)
    before = copy.deepcopy(states)
    assert why_not_static(model, states) == ""
    for state, earlier in zip(states, before, strict=True):  # a question changes nothing
        assert state.__dict__.keys() == earlier.__dict__.keys()
        torch.testing.assert_close(state.tensors(), earlier.tensors(), rtol=0, atol=0)


def test_a_counter_on_the_host_is_named(builder):
    model = build(builder, "swiglu", "toy")
    assert why_not_static(model, filled(model)) == "MeanState keeps 'count' on the host"


def test_a_layer_that_waits_for_the_device_is_named(builder, monkeypatch):
    model = build(builder, "swiglu", "mamba")
    monkeypatch.setattr(type(model.layers[1]), "host_synchronized", True)
    assert why_not_static(model, filled(model)) == "Mamba waits for the device within a step"


@dataclasses.dataclass
class Sums(State):
    total_BD: torch.Tensor
    last_BND: torch.Tensor | None = None


@dataclasses.dataclass
class Pair(State):
    sums: Sums
    extra_B: torch.Tensor


def with_step(builder, monkeypatch, step):
    """A model of one layer whose state is a Pair, and whose step is `step(x_BD, state)`."""
    model = build(builder, "swiglu")
    layer = type(model.layers[0])

    def init_state(self, batch_size, max_length, **factory):
        total_BD = torch.zeros(batch_size, WIDTH)
        return Pair(Sums(total_BD, torch.zeros(batch_size, 0, WIDTH)), torch.zeros(batch_size))

    monkeypatch.setattr(layer, "init_state", init_state)
    monkeypatch.setattr(layer, "step", lambda self, x_BD, state, context=None: step(x_BD, state))
    return model


def test_a_state_that_grows_is_named(builder, monkeypatch):
    def step(x_BD, state):
        state.sums.last_BND = torch.cat([state.sums.last_BND, x_BD[:, None]], dim=1)
        return state.sums.last_BND.sum(1)

    model = with_step(builder, monkeypatch, step)
    reason = why_not_static(model, model.init_state(2, 8))
    assert reason == "a step of Sums changes the size or kind of 'last_BND'"


@torch.inference_mode()
def test_a_tensor_put_in_anothers_stead_goes_back_to_its_place(builder, monkeypatch):
    """A graph reads where it read: what is only assigned would never reach it."""

    def step(x_BD, state):
        state.sums.total_BD = state.sums.total_BD + x_BD
        state.extra_B.add_(1)
        return state.sums.total_BD

    model = with_step(builder, monkeypatch, step)
    states, plain = model.init_state(2, 8), model.init_state(2, 8)
    assert why_not_static(model, states) == ""
    places = Places(states)
    addresses = [tensor.data_ptr() for tensor in states[0].tensors().values()]
    for tokens_B in prompt().unbind(1):
        found = model.step(tokens_B, states)
        places.take_back()
        torch.testing.assert_close(found, model.step(tokens_B, plain))
        assert [t.data_ptr() for t in states[0].tensors().values()] == addresses
    torch.testing.assert_close(states[0].tensors(), plain[0].tensors())
    assert states[0].extra_B.tolist() == [5, 5]


@dataclasses.dataclass
class Passing(State):
    last_B: torch.Tensor
    older_B: torch.Tensor
    odd: bool = False


def test_a_tensor_passed_on_from_field_to_field_keeps_its_value():
    state = Passing(torch.tensor([1.0]), torch.tensor([0.0]))
    places = Places([state])
    addresses = state.last_B.data_ptr(), state.older_B.data_ptr()
    for token in (2.0, 3.0, 4.0):
        state.older_B, state.last_B = state.last_B, torch.tensor([token])
        places.take_back()
        assert (state.older_B.item(), state.last_B.item()) == (token - 1, token)
        assert (state.last_B.data_ptr(), state.older_B.data_ptr()) == addresses


def test_a_flag_that_a_step_turns_is_refused(builder, monkeypatch):
    model = build(builder, "swiglu")
    states = [Passing(torch.zeros(2), torch.zeros(2))]

    def step(tokens_B, states):
        states[0].odd = not states[0].odd

    monkeypatch.setattr(model, "step", step)
    assert why_not_static(model, states) == "a step changes 0.Passing.odd, which is no tensor"


def counting(model, states, batch_size):
    """A Stepper that counts as a captured step does; its states are static, its steps eager."""
    for state in states:
        state.make_static()

    def step(tokens_B):
        require_room(states)
        logits_BV = model.step(tokens_B, states)
        for state in states:
            state.advance()
        return logits_BV

    return step


@torch.inference_mode()
def test_full_states_are_refused_until_they_are_restored(builder):
    model = build(builder, "mamba", "attention")
    states = filled(model, tokens=3)
    before = copy.deepcopy(states)
    step = counting(model, states, 2)
    for _ in range(2):
        for tokens_B in prompt(3).unbind(1):
            step(tokens_B)
        with pytest.raises(WorkbenchError, match=r"KVCache is full: .* max_length"):
            step(tokens_B)
        for state, earlier in zip(states, before, strict=True):
            state.restore(earlier)


def test_timing_many_steps_takes_no_more_room_than_it_asked_for(builder):
    timing = decode_time(
        build(builder, "attention"), 2, 5, tokens=3, min_seconds=0.0, stepper=counting
    )
    assert timing.repeats == 20  # of three tokens each round
