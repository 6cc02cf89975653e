"""Measured metrics: what they time, what they leave beside the figure; nothing else moves."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.plugins.test_metrics import hybrid, measure, subject_of
from workbench import roofline
from workbench.builder import Builder
from workbench.config import NoConfig
from workbench.errors import WorkbenchError
from workbench.latency_machine import Machine
from workbench.measuring import Timing
from workbench.measuring_generation import Generation
from workbench.model import HybridLM
from workbench.quantizer import num_bytes
from workbench.roofline import Ceilings, Roofline
from workbench.testing import MetricContract
from workbench.testing.toys import ToyText
from workbench_metrics import speed
from workbench_metrics.config import Decode, Generate, Prefill, Throughput


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Ceilings of 1 GB/s and 10 GFLOP/s, found at once; lists where they were looked for."""
    asked = []

    def found(device: str, dtype: str, folder: Path) -> Ceilings:
        asked.append(folder)
        return Ceilings(
            machine=Machine.here(device, dtype), bandwidth=1e9, rate=1e10, cache_bytes=0
        )

    monkeypatch.setenv("WORKBENCH_RUNS", str(tmp_path))
    monkeypatch.setattr(roofline, "ceilings", found)
    return asked


# What trials rely on


class TestDecodeMilliseconds(MetricContract):
    metric = speed.DecodeMilliseconds
    configs = (Decode(batch_size=2, context=8, tokens=4),)


class TestPrefillMilliseconds(MetricContract):
    metric = speed.PrefillMilliseconds
    configs = (Prefill(batch_size=2, length=8),)


class TestTokensPerSecond(MetricContract):
    metric = speed.TokensPerSecond
    configs = (Throughput(context=8, tokens=4),)


class TestTimeToFirstToken(MetricContract):
    metric = speed.TimeToFirstToken
    configs = (Prefill(batch_size=2, length=8),)


class TestTimePerOutputToken(MetricContract):
    metric = speed.TimePerOutputToken
    configs = (Generate(batch_size=2, context=8, tokens=4),)


class TestGenerationTokensPerSecond(MetricContract):
    metric = speed.GenerationTokensPerSecond
    configs = (Generate(context=8, tokens=4),)


# Figures


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Replaces the clockwork; lists what was to be timed."""
    asked: list[tuple[Any, ...]] = []

    def timed(model: HybridLM, *sizes: int, **how: Any) -> Timing:
        asked.append(sizes)
        return Timing(median=0.004, p10=0.003, p90=0.006, repeats=30)

    def generated(model: HybridLM, *sizes: int, **how: Any) -> Generation:
        timing = timed(model, *sizes)
        slow = dataclasses.replace(timing, median=0.5, p10=0.5, p90=0.5)
        return Generation(first_token=slow, per_token=timing, total=slow, tokens_per_second=64.0)

    for name in ("decode_time", "prefill_time", "first_token_time"):
        monkeypatch.setattr(speed, name, timed)
    monkeypatch.setattr(speed, "generation_time", generated)
    return asked


@pytest.mark.parametrize(
    ("name", "config", "figure", "sizes"),
    [
        ("decode_ms", {}, 4.0, (1, 512, 32)),
        ("decode_ms", {"batch_size": 2, "context": 64, "tokens": 8}, 4.0, (2, 64, 8)),
        ("prefill_ms", {}, 4.0, (1, 512)),
        ("prefill_ms", {"batch_size": 4, "length": 100}, 4.0, (4, 100)),
        ("tokens_per_second", {}, 8 / 0.004, (8, 512, 32)),
        ("tokens_per_second", {"batch_size": 3, "context": 9}, 3 / 0.004, (3, 9, 32)),
        ("ttft_ms", {"batch_size": 4, "length": 100}, 4.0, (4, 100)),
        ("tpot_ms", {"batch_size": 2, "context": 64, "tokens": 8}, 4.0, (2, 64, 8)),
    ],
)
def test_timings_become_figures(
    builder: Builder,
    timings: list[tuple[Any, ...]],
    name: str,
    config: dict[str, int],
    figure: float,
    sizes: tuple[int, ...],
) -> None:
    model = builder.build(hybrid(), device="meta")
    subject = subject_of(builder, hybrid(), model=model)
    assert measure(builder, name, subject, **config) == pytest.approx(figure)
    assert timings == [sizes]
    phase = "prefill" if name in ("prefill_ms", "ttft_ms") else "decode"
    limits = Ceilings(machine=Machine.here("cpu"), bandwidth=1e9, rate=1e10, cache_bytes=0)
    bound = Roofline(builder, limits).bound(subject.layout, phase, *sizes[:2])
    assert subject.extras == pytest.approx(
        {
            "p10_ms": 3,
            "p90_ms": 6,
            "spread": 0.75,
            "noisy": 1,
            "repeats": 30,
            "bound_ms": 1000 * bound.seconds,
            "mfu": bound.compute_seconds / 0.004,
            "mbu": bound.memory_seconds / 0.004,
        }
    )


def test_throughput_of_whole_generations_has_no_phase_s_bound(
    builder: Builder, timings: list[tuple[Any, ...]]
) -> None:
    subject = subject_of(builder, hybrid(), model=builder.build(hybrid(), device="meta"))
    assert measure(builder, "generation_tokens_per_second", subject, tokens=9) == 64.0
    assert timings == [(1, 512, 9)]
    assert subject.extras.keys() == {"p10_ms", "p90_ms", "spread", "noisy", "repeats"}


def test_ceilings_are_kept_beside_the_study_s_data(
    builder: Builder, tmp_path: Path, limits: list[Path]
) -> None:
    model = builder.build(hybrid())
    data = ToyText(NoConfig(), cache_dir=tmp_path / "cache")
    for given in (data, None):
        subject = subject_of(builder, hybrid(), model=model, data=given)
        measure(builder, "prefill_ms", subject, length=4)
    assert limits == [tmp_path / "cache" / "latency", tmp_path / ".cache" / "latency"]


@pytest.mark.parametrize("phase", ["prefill", "decode", "training"])
def test_peak_memory_is_refused_on_a_cpu(builder: Builder, phase: str) -> None:
    subject = subject_of(builder, hybrid(), model=builder.build(hybrid()))
    with pytest.raises(WorkbenchError, match="peak memory cannot be measured on 'cpu'"):
        measure(builder, "peak_memory_bytes", subject, phase=phase)
    assert subject.extras == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("phase", ["prefill", "decode", "training"])
def test_peak_memory_holds_the_weights(builder: Builder, phase: str) -> None:
    model = builder.build(hybrid(), device="cuda")
    subject = subject_of(builder, hybrid(), model=model, device="cuda")
    figure = measure(builder, "peak_memory_bytes", subject, phase=phase, context=64)
    assert num_bytes(model) < figure <= subject.extras["reserved"]


@pytest.mark.parametrize(
    "name",
    [
        *("decode_ms", "prefill_ms", "tokens_per_second", "ttft_ms", "tpot_ms"),
        "generation_tokens_per_second",
    ],
)
def test_measured_figures_are_positive_and_leave_the_model_alone(
    builder: Builder, name: str
) -> None:
    layout = hybrid("int8")
    model = builder.build(layout)
    builder.quantize(model)
    model.train()
    weights, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    subject = subject_of(builder, layout, model=model)
    size = {"length": 16} if name in ("prefill_ms", "ttft_ms") else {"context": 16, "tokens": 4}
    figure = measure(builder, name, subject, batch_size=2, **size)
    assert 0 < figure < math.inf
    assert 0 < subject.extras["p10_ms"] <= subject.extras["p90_ms"] < math.inf
    steps = {"steps": "eager: CUDA graphs need a CUDA device"}
    refused = "prefills cannot be captured as a CUDA graph: CUDA graphs need a CUDA device"
    notes = {"ttft_ms": {}, "prefill_ms": {"prefill": f"eager: {refused}"}}
    assert subject.notes == notes.get(name, steps)
    assert model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
