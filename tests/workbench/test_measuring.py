"""Timing against a clock that the test turns itself; models are left as they were."""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.builder import Builder
from workbench.clocks import ProcessorClock
from workbench.errors import FieldError, UnknownNameError, WorkbenchError
from workbench.layer import State
from workbench.layout import Block, Layout
from workbench.measuring import (
    Prefill,
    Timing,
    decode_time,
    eager,
    first_token_time,
    memory_peak,
    peak_memory,
    prefill_time,
    prefiller_of,
    stepper_of,
    time_calls,
)
from workbench.measuring_generation import generation_time
from workbench.model import HybridLM
from workbench.testing.toys import ToyMixer, toy_builder


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Clock:
    """A clock that moves only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def work(self, durations: Iterator[float]) -> Callable[..., None]:
        """A function each of whose calls takes the next of `durations`."""

        def function(*arguments: Any) -> None:
            self.now += next(durations)

        return function


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def toy(depth: int = 2, layer: str = "toy-mixer", **build: Any) -> HybridLM:
    blocks = (Block(layer=layer),) * depth
    return toy_builder().build(Layout(d_model=32, vocab_size=64, blocks=blocks), **build)


# Calls


def test_the_figure_is_the_median_with_its_deciles(clock: Clock) -> None:
    durations = [3.0, 1.0, 2.0, 5.0, 4.0, 8.0, 7.0, 6.0, 11.0, 10.0, 9.0]
    timing = time_calls(
        clock.work(iter(durations)), device="cpu", warmup=0, repeats=11, min_seconds=0
    )
    assert timing.median == pytest.approx(6)
    assert timing.p10 == pytest.approx(2)
    assert timing.p90 == pytest.approx(10)
    assert timing.repeats == 11
    assert timing.spread == pytest.approx(8 / 6)
    assert timing.noisy


def test_warm_up_is_never_in_the_figure(clock: Clock) -> None:
    durations = itertools.chain([1000.0] * 3, itertools.repeat(0.25))
    timing = time_calls(clock.work(durations), device="cpu", warmup=3, repeats=4, min_seconds=0)
    assert timing == Timing(median=0.25, p10=0.25, p90=0.25, repeats=4)
    assert not timing.noisy


@pytest.mark.parametrize(("min_seconds", "least"), [(0, 4), (0.5, 4), (2.25, 9), (10, 40)])
def test_timing_goes_on_until_it_lasted(clock: Clock, min_seconds: float, least: int) -> None:
    timing = time_calls(
        clock.work(itertools.repeat(0.25)), device="cpu", repeats=4, min_seconds=min_seconds
    )
    assert least <= timing.repeats < least + 4


def test_arguments_are_made_outside_the_timed_part(clock: Clock) -> None:
    seen = []

    def arguments() -> Iterator[tuple[int]]:
        for number in itertools.count():
            clock.now += 50
            yield (number,)

    def function(number: int) -> None:
        seen.append(number)
        clock.now += 0.5

    timing = time_calls(
        function, device="cpu", warmup=2, repeats=5, min_seconds=0, arguments=arguments()
    )
    assert timing.median == timing.p90 == 0.5
    assert seen == list(range(7))


@pytest.mark.parametrize(("p90", "noisy"), [(1.04, False), (1.06, True)])
def test_a_spread_above_five_percent_is_marked(p90: float, noisy: bool) -> None:
    assert Timing(median=1.0, p10=1.0, p90=p90, repeats=9).noisy is noisy


def test_a_real_clock_is_read() -> None:
    timing = time_calls(lambda: time.sleep(0.002), device="cpu", repeats=5, min_seconds=0)
    assert 0.002 <= timing.p10 <= timing.median <= timing.p90 < 1


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_collected_meanwhile(enabled: bool) -> None:
    was_enabled = gc.isenabled()
    seen = []
    try:
        (gc.enable if enabled else gc.disable)()
        time_calls(
            lambda: seen.append(gc.isenabled()), device="cpu", warmup=0, repeats=3, min_seconds=0
        )
        assert gc.isenabled() is enabled
        with pytest.raises(ZeroDivisionError):
            time_calls(lambda: 1 / 0, device="cpu", warmup=0)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()
    assert seen == [False] * 3


@pytest.mark.parametrize("bad", [{"repeats": 1}, {"warmup": -1}, {"min_seconds": -0.1}])
def test_nonsense_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(FieldError) as error:
        time_calls(lambda: None, device="cpu", **bad)
    assert error.value.field == next(iter(bad))


def test_a_device_without_a_known_clock_is_refused() -> None:
    with pytest.raises(WorkbenchError, match="cannot time on 'meta'"):
        time_calls(lambda: None, device="meta")


def test_processor_time_leaves_out_what_was_waited_for() -> None:
    def asleep_then_busy() -> None:
        time.sleep(0.01)
        end = time.process_time() + 0.002
        while time.process_time() < end:
            pass

    timing = time_calls(
        asleep_then_busy, device="cpu", repeats=5, min_seconds=0, clock=ProcessorClock
    )
    assert 0.002 <= timing.p10 <= timing.median < 0.008


def test_peak_memory_is_refused_where_nothing_counts_it() -> None:
    called: list[int] = []
    for peak in (peak_memory, memory_peak):
        with pytest.raises(WorkbenchError, match="peak memory cannot be measured on 'cpu'"):
            peak(lambda: called.append(1), "cpu")
    assert not called


# Models


@dataclasses.dataclass
class Seen(State):
    """How many tokens a state has seen, once as a tensor and once not."""

    tokens_B: Tensor
    count: int = 0


class Diary(HybridLM):
    """Notes what it is asked: tokens, and how many tokens its states had seen before."""

    def __init__(self, *arguments: Any, **factory: Any) -> None:
        super().__init__(*arguments, **factory)
        self.prefills: list[Tensor] = []
        self.steps: list[Tensor] = []
        self.lengths: list[int] = []
        self.max_lengths: set[int] = set()

    def init_state(self, batch_size: int, max_length: int, **factory: Any) -> list[Any]:
        self.max_lengths.add(max_length)
        return [Seen(torch.zeros(batch_size, dtype=torch.long))]

    def prefill(self, tokens_BT: Tensor, states: Any, *rest: Any) -> Tensor:
        assert torch.is_inference_mode_enabled()
        assert not self.training
        self.prefills.append(tokens_BT)
        return self._see(states[0], tokens_BT.shape[1])

    def step(self, tokens_B: Tensor, states: Any) -> Tensor:
        assert torch.is_inference_mode_enabled()
        assert not self.training
        self.steps.append(tokens_B)
        return self._see(states[0], 1)

    def _see(self, state: Seen, tokens: int) -> Tensor:
        """Note what the state says, and score highest the token that is the context's length."""
        assert state.tokens_B.tolist() == [state.count] * len(state.tokens_B)
        self.lengths.append(state.count)
        state.tokens_B += tokens
        state.count += tokens
        return torch.nn.functional.one_hot(state.tokens_B % 50, 50).float()


def diary() -> Diary:
    layout = Layout(d_model=8, vocab_size=50, blocks=(Block(layer="toy-mixer"),))
    return Diary(layout, [ToyMixer(8, ToyMixer.Config())])


def test_decode_stays_near_the_asked_context() -> None:
    model = diary()
    timing = decode_time(model, 3, 40, tokens=7, warmup=2, min_seconds=0)
    assert len(model.prefills) == 1
    assert model.prefills[0].shape == (3, 40)
    assert len(model.steps) == timing.repeats + 2
    assert all(tokens_B.shape == (3,) for tokens_B in model.steps)
    assert model.max_lengths == {47}
    expected = itertools.cycle(range(40, 47))
    assert model.lengths[1:] == list(itertools.islice(expected, len(model.steps)))


def test_every_prefill_starts_from_an_empty_state() -> None:
    model = diary()
    timing = prefill_time(model, 2, 9, warmup=1, repeats=4, min_seconds=0)
    assert timing.repeats == 4
    assert len(model.prefills) == 5
    assert set(model.lengths) == {0}
    assert model.max_lengths == {9}


def test_a_stepper_is_given_the_filled_states_and_takes_every_step() -> None:
    model = diary()
    made: list[list[Seen]] = []

    def stepper(model: HybridLM, states: list[Any], batch_size: int) -> Callable[[Tensor], Tensor]:
        assert [state.count for state in states] == [12]
        made.append(states)
        tensor_B = states[0].tokens_B

        def step(tokens_B: Tensor) -> Tensor:
            # A graph's buffers: the very tensors that were there at the start.
            assert states[0].tokens_B is tensor_B
            return eager(model, states, batch_size)(tokens_B)

        return step

    decode_time(model, 2, 12, tokens=3, warmup=0, min_seconds=0, stepper=stepper)
    assert len(made) == 1
    expected = itertools.cycle(range(12, 15))
    assert model.lengths[1:] == list(itertools.islice(expected, len(model.steps)))


def test_steps_from_restored_states_are_the_same_steps(
    builder: Builder, small_layout: Layout
) -> None:
    model = builder.build(small_layout).eval()
    prompt_BT, token_B = torch.randint(64, (2, 9)), torch.tensor([1, 2])
    with torch.inference_mode():
        filled = model.init_state(2, 16)
        model.prefill(prompt_BT, filled)
        states = copy.deepcopy(filled)
        first = [model.step(token_B, states) for _ in range(3)]
        for state, before in zip(states, filled, strict=True):
            state.restore(before)
        again = [model.step(token_B, states) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])


def test_ways_to_run_steps_have_names() -> None:
    assert stepper_of("auto", "cpu") == stepper_of("eager", "cuda") == ("eager", eager)
    assert stepper_of("auto", "cuda")[0] == stepper_of("cuda-graph", "cpu")[0] == "cuda-graph"
    with pytest.raises(UnknownNameError, match="unknown way to run steps 'quick'"):
        stepper_of("quick", "cpu")
    _, captured = stepper_of("cuda-graph", "cpu")
    with pytest.raises(WorkbenchError, match="cannot be captured"):
        decode_time(toy(), 1, 4, stepper=captured)


def test_prefills_run_as_steps_do() -> None:
    assert prefiller_of("auto", "cpu") is prefiller_of("eager", "cuda") is None
    captured = prefiller_of("auto", "cuda")
    assert captured is prefiller_of("cuda-graph", "cpu") is not None
    with pytest.raises(WorkbenchError, match="prefills cannot be captured"):
        prefill_time(toy(), 1, 4, prefiller=captured)
    with pytest.raises(UnknownNameError, match="unknown way to run steps 'quick'"):
        prefiller_of("quick", "cpu")


def test_a_prefiller_is_made_once_and_its_calls_are_timed() -> None:
    made, calls = [], []

    def prefiller(model: HybridLM, prompt_BT: Tensor) -> Prefill:
        made.append(prompt_BT)
        time.sleep(0.2)

        def prefill(given_BT: Tensor) -> Tensor:
            calls.append(given_BT)
            return model.prefill(given_BT, model.init_state(*given_BT.shape))

        return prefill

    timing = prefill_time(toy(), 2, 5, warmup=1, repeats=3, min_seconds=0, prefiller=prefiller)
    assert len(made) == 1
    assert len(calls) == 4
    assert timing.repeats == 3
    assert timing.p90 < 0.2
    assert all(torch.equal(given_BT, made[0]) for given_BT in calls)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cold_step_reads_its_weights_from_memory(builder: Builder) -> None:
    # 25 MB of weights: they stay in the last cache from step to step, unless it is emptied.
    layout = Layout(d_model=1024, vocab_size=64, blocks=(Block(layer="swiglu"),) * 2)
    model = builder.build(layout, device="cuda")
    _, captured = stepper_of("cuda-graph", "cuda")
    warm, cold = (
        decode_time(model, 1, 4, tokens=4, stepper=captured, cold=cold).median
        for cold in (False, True)
    )
    assert cold > 1.2 * warm


def test_cold_changes_nothing_on_a_cpu() -> None:
    model = diary()
    timing = decode_time(model, 2, 5, tokens=3, warmup=1, min_seconds=0, cold=True)
    assert timing.repeats == 20
    assert prefill_time(toy(), 2, 5, repeats=3, min_seconds=0, cold=True).repeats == 3


def test_tokens_come_from_the_seed_alone() -> None:
    models = [diary() for _ in range(3)]
    for model, seed, noise in zip(models, (1, 1, 2), (11, 12, 13), strict=True):
        torch.manual_seed(noise)
        decode_time(model, 2, 30, tokens=5, seed=seed, min_seconds=0)
    first, same, other = models
    assert torch.equal(first.prefills[0], same.prefills[0])
    assert torch.equal(torch.stack(first.steps), torch.stack(same.steps))
    assert not torch.equal(first.prefills[0], other.prefills[0])
    assert 0 <= int(first.prefills[0].min()) <= int(first.prefills[0].max()) < 50


MEASURES: dict[str, Callable[[HybridLM], Timing]] = {
    "decode": lambda model: decode_time(model, 2, 8, tokens=4, min_seconds=0),
    "prefill": lambda model: prefill_time(model, 2, 8, min_seconds=0),
    "first token": lambda model: first_token_time(model, 2, 8, min_seconds=0),
    "generation": lambda model: generation_time(model, 2, 8, 4, min_seconds=0).total,
}


@pytest.mark.parametrize("measure", MEASURES)
def test_measuring_leaves_no_trace(measure: str, builder: Builder, small_layout: Layout) -> None:
    model = builder.build(small_layout)
    model.train()
    model.blocks[1].eval()
    flags = [module.training for module in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    timing = MEASURES[measure](model)
    assert timing.median > 0
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == flags
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert not torch.is_inference_mode_enabled()
    tokens_BT = torch.randint(64, (2, 9))
    model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_training_flags_are_restored_after_a_failure() -> None:
    model = toy().train()
    model.init_state = None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        decode_time(model, 1, 4)
    assert all(module.training for module in model.modules())


def test_deeper_models_take_longer_to_decode() -> None:
    shallow, deep = (
        decode_time(toy(depth), 1, 4, tokens=32, min_seconds=0.05).median for depth in (2, 32)
    )
    assert deep > 4 * shallow


def test_longer_prompts_take_longer() -> None:
    model = toy()
    short, long = (prefill_time(model, 1, length, min_seconds=0.05).median for length in (8, 256))
    assert long > 4 * short


@pytest.mark.parametrize("field", ["batch_size", "context", "tokens"])
def test_decode_sizes_must_be_positive(field: str) -> None:
    sizes = {"batch_size": 1, "context": 4, "tokens": 4, field: 0}
    with pytest.raises(FieldError, match=f"{field}: must be at least 1, got 0"):
        decode_time(toy(), **sizes)


@pytest.mark.parametrize("field", ["batch_size", "length"])
def test_prefill_sizes_must_be_positive(field: str) -> None:
    with pytest.raises(FieldError, match=f"{field}: must be at least 1, got 0"):
        prefill_time(toy(), **{"batch_size": 1, "length": 4, field: 0})
