"""What a captured prefill does besides its graph: states emptied in place, counters taken back."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from workbench import Block, Layout, WorkbenchError
from workbench.builder import Builder
from workbench.captured_generation import CapturedGeneration, CapturedPrefill, Empty, sharing
from workbench.decoding import NotCapturedError
from workbench.layer import State

PROMPT, NEW = 9, 6


@pytest.fixture
def model():
    blocks = (
        Block(layer="mamba2", config={"headdim": 16, "d_state": 16}),
        Block(layer="attention", config={"num_heads": 4, "num_kv_heads": 2}),
        Block(layer="attention", config={"num_heads": 4, "sliding_window": 5}),
        Block(layer="mamba"),
    )
    return Builder.load().build(Layout(d_model=64, vocab_size=31, blocks=blocks), seed=0).eval()


def prompts():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(31, (3, 2, PROMPT + NEW), generator=generator)


def generated(model, states, tokens, prefill=True):
    """Logits of the prompt's end, if it is to be taken in, and of each step."""
    found = [model.prefill(tokens[:, :PROMPT], states)] if prefill else []
    found += [model.step(tokens[:, PROMPT + i], states) for i in range(NEW)]
    return torch.stack(found)


@torch.inference_mode()
def test_emptied_states_are_new_ones_at_the_same_places(model):
    states = model.init_state(2, PROMPT + NEW)
    empty = Empty(states)
    addresses = [t.data_ptr() for state in states for t in state.tensors().values()]
    for tokens in prompts():
        found = generated(model, states, tokens)
        wanted = generated(model, model.init_state(2, PROMPT + NEW), tokens)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        empty.again()
        for state, new in zip(states, model.init_state(2, PROMPT + NEW), strict=True):
            torch.testing.assert_close(state.tensors(), new.tensors(), rtol=0, atol=0)
            assert state.room == new.room
    assert [t.data_ptr() for state in states for t in state.tensors().values()] == addresses


@torch.inference_mode()
def test_static_states_go_on_from_each_prefill_that_is_written_into_them(model):
    """As a replay does it: it writes tensors, and the host's counters are put beside them."""
    states = model.init_state(2, PROMPT + NEW)
    model.prefill(prompts()[0, :, :PROMPT], states)
    filled = [sharing(state) for state in states]
    for state in states:
        state.make_static()
    for tokens in prompts():
        fresh = model.init_state(2, PROMPT + NEW)
        model.prefill(tokens[:, :PROMPT], fresh)
        for state, new, counted in zip(states, fresh, filled, strict=True):
            for name, tensor in new.tensors().items():
                state.tensors()[name].copy_(tensor)
            state.restore(counted)
        found = generated(model, states, tokens, prefill=False)
        torch.testing.assert_close(found, generated(model, fresh, tokens, prefill=False))


@dataclasses.dataclass
class Scores(State):
    best_B: torch.Tensor


@dataclasses.dataclass
class Pair(State):
    scores: Scores
    seen: int = 0


def test_states_that_begin_with_other_than_zeros_and_nest_others():
    best_B = torch.full((2,), -torch.inf)
    state = Pair(Scores(best_B))
    empty = Empty([state])
    state.seen, state.scores.best_B = 4, torch.ones(2)  # a layer may put another in its place
    empty.again()
    assert (state.seen, state.scores.best_B is best_B) == (0, True)
    assert state.scores.best_B.tolist() == [-torch.inf] * 2


@torch.inference_mode()
def test_a_cpu_captures_nothing_and_says_so(model):
    prompt = prompts()[0, :, :PROMPT]
    states = model.init_state(2, PROMPT)
    with pytest.raises(NotCapturedError, match=r"prefills cannot be captured .* CUDA device"):
        CapturedPrefill(model, states, prompt)
    with pytest.raises(WorkbenchError, match=r"generations cannot be captured .* CUDA device"):
        CapturedGeneration(model, prompt, NEW)
    assert not any(t.any() for state in states for t in state.tensors().values())
