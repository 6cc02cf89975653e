"""Whole generations and memory peaks: what is asked of the model, and where the time is cut."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.workbench.test_measuring import Clock, diary, toy
from workbench.builder import Builder
from workbench.errors import FieldError, WorkbenchError
from workbench.generation import SamplingConfig, generate
from workbench.layout import Layout
from workbench.measuring import decode_time, first_token_time, stepper_of
from workbench.measuring_generation import generation_time
from workbench.measuring_memory import inference_memory, training_memory
from workbench.model import HybridLM
from workbench.training_config import TrainingConfig


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_each_token_of_a_generation_feeds_the_next() -> None:
    model = diary()
    generation = generation_time(model, 3, 7, tokens=5, warmup=1, repeats=2, min_seconds=0)
    assert len(model.prefills) == 3
    assert model.max_lengths == {12}
    assert model.lengths == [0, 7, 8, 9, 10] * 3
    # The diary's likeliest token is the length of the context that it was drawn from.
    assert [tokens_B.tolist() for tokens_B in model.steps[:4]] == [[n] * 3 for n in (7, 8, 9, 10)]
    assert generation.first_token.repeats == generation.total.repeats == 2
    assert generation.per_token.repeats == 2 * 4
    assert generation.tokens_per_second == pytest.approx(3 * 5 / generation.total.median)


def test_a_generation_s_time_is_cut_where_its_tokens_are(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    model = diary()
    plain = model.prefill

    def prefill(*arguments: Any) -> Tensor:
        clock.now += 4.0
        return plain(*arguments)

    def stepper(model: HybridLM, states: list[Any], batch_size: int) -> Callable[[Tensor], Tensor]:
        clock.now += 1000.0  # captured once: not in any figure

        def step(tokens_B: Tensor) -> Tensor:
            clock.now += 0.5
            return model.step(tokens_B, states)

        return step

    monkeypatch.setattr(model, "prefill", prefill)
    generation = generation_time(model, 2, 6, tokens=9, stepper=stepper, min_seconds=0)
    assert generation.first_token.median == 4.0
    assert generation.per_token.median == generation.per_token.p90 == 0.5
    assert generation.total.median == 8.0
    assert generation.tokens_per_second == 2 * 9 / 8.0
    timing = first_token_time(model, 2, 6, min_seconds=0)
    assert timing.median == 4.0


def test_a_timed_generation_is_what_generate_gives(builder: Builder, small_layout: Layout) -> None:
    model, seen = builder.build(small_layout), []
    sampling = SamplingConfig(temperature=1.0, top_k=20)

    def stepper(model: HybridLM, states: list[Any], batch_size: int) -> Callable[[Tensor], Tensor]:
        def step(tokens_B: Tensor) -> Tensor:
            seen.append(tokens_B.tolist())
            return model.step(tokens_B, states)

        return step

    generation_time(
        model, 2, 6, 5, sampling=sampling, seed=3, warmup=0, min_seconds=0, stepper=stepper
    )
    prompt_BT = torch.randint(
        small_layout.vocab_size, (2, 6), generator=torch.Generator().manual_seed(3)
    )
    whole_BT = generate(model.eval(), prompt_BT, 5, config=sampling, seed=3)
    assert seen[:4] == whole_BT[:, 6:-1].T.tolist()


@pytest.mark.parametrize(
    "bad", [{"batch_size": 0}, {"context": 0}, {"tokens": 1}, {"repeats": 1}, {"warmup": -1}]
)
def test_generations_that_make_no_sense(bad: dict[str, int]) -> None:
    with pytest.raises(FieldError) as error:
        generation_time(toy(), **{"batch_size": 1, "context": 4, **bad})
    assert error.value.field == next(iter(bad))


def test_peak_memory_is_refused_where_nothing_counts_it() -> None:
    model = diary()
    with pytest.raises(WorkbenchError, match="on 'cpu'"):
        inference_memory(model, "decode", 1, 4)
    with pytest.raises(WorkbenchError, match="on 'cpu'"):
        training_memory(model, TrainingConfig(tokens=8, batch_size=2, seq_len=4))
    assert not model.prefills
    with pytest.raises(FieldError, match="phase: must be 'prefill' or 'decode', got 'training'"):
        inference_memory(model, "training", 1, 4)  # type: ignore[arg-type]


# A GPU

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@gpu
def test_peaks_hold_what_must_be_held(builder: Builder, small_layout: Layout) -> None:
    model = builder.build(small_layout, device="cuda")
    weights = 4 * model.num_parameters
    few, many = (inference_memory(model, "decode", batch, 64) for batch in (1, 512))
    assert weights < few.allocated < many.allocated <= many.reserved
    assert inference_memory(model, "prefill", 64, 64).allocated > weights
    config = TrainingConfig(tokens=4 * 64, batch_size=4, seq_len=64)
    # Weights, gradients and at least one moment.
    assert training_memory(model, config).allocated > 3 * weights


@pytest.mark.gpu
@gpu
def test_captured_steps_are_timed(builder: Builder, small_layout: Layout) -> None:
    model = builder.build(small_layout, device="cuda")
    _, captured = stepper_of("cuda-graph", "cuda")
    assert decode_time(model, 2, 64, stepper=captured).median < decode_time(model, 2, 64).median
    assert generation_time(model, 2, 64, 8, stepper=captured).tokens_per_second > 0
    assert inference_memory(model, "decode", 2, 64, stepper=captured).allocated > 0


@pytest.mark.gpu
@gpu
def test_the_device_s_own_clock_is_read(builder: Builder, small_layout: Layout) -> None:
    model = builder.build(small_layout, device="cuda")
    generation = generation_time(model, 2, 64, 8)
    assert 0 < generation.per_token.median < generation.first_token.median + generation.total.median
    assert generation.total.median < 1
