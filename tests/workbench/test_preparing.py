"""What compiles, tunes and captures is counted, and counted apart from what is timed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.workbench.conftest import make_config
from workbench import Block, Layout, compilation
from workbench.builder import Builder, default_builder
from workbench.compilation import prepared_seconds, preparing
from workbench.executors.base import Job
from workbench.identity import used_plugins
from workbench.measuring import decode_time, time_calls
from workbench.measuring_generation import generation_time
from workbench.testing.toys import ToyText
from workbench.train_step import WARMUP, TrainStep
from workbench.training import train
from workbench.training_config import TrainingConfig

SLOW = 0.2  # seconds that a first call takes
LAYOUT = Layout(d_model=32, vocab_size=256, blocks=(Block(layer="mamba"), Block(layer="swiglu")))
CONFIG = TrainingConfig(tokens=640, batch_size=4, seq_len=16, lr=0.02, checkpoint_seconds=0)


class Tuned:
    """Takes `SLOW` seconds until it was called `first` times."""

    def __init__(self, first: int = 1) -> None:
        self.left = first

    def __call__(self, *_: object) -> None:
        if self.left > 0:
            time.sleep(SLOW)
        self.left -= 1


def spent(function: object, *arguments: object, **options: object) -> tuple[float, object]:
    before = prepared_seconds()
    result = function(*arguments, **options)
    return prepared_seconds() - before, result


@pytest.fixture(scope="module")
def model():
    return Builder.load().build(LAYOUT, seed=0)


@pytest.fixture
def data(tmp_path):
    return ToyText(ToyText.Config(), seed=0, cache_dir=tmp_path)


def test_nested_blocks_count_once_and_a_failing_one_counts(monkeypatch) -> None:
    now = 0.0
    monkeypatch.setattr(compilation.time, "perf_counter", lambda: now)
    before = prepared_seconds()
    with preparing("cpu"):
        now += 1
        with preparing("cpu"):
            now += 2
        now += 4
    now += 8  # outside nothing counts
    assert prepared_seconds() - before == pytest.approx(7)
    with contextlib.suppress(ValueError), preparing("cpu"):
        now += 16
        raise ValueError
    assert prepared_seconds() - before == pytest.approx(23)


def test_a_timing_holds_no_first_call_and_tells_what_it_took() -> None:
    seconds, timing = spent(
        time_calls, Tuned(3), device="cpu", warmup=3, repeats=5, min_seconds=0.001
    )
    assert seconds >= 3 * SLOW
    assert timing.p90 < SLOW / 2


def test_making_a_stepper_is_preparing(model) -> None:
    def stepper(model, states, batch_size):
        time.sleep(SLOW)
        return lambda tokens_B: model.step(tokens_B, states)

    sizes = {"batch_size": 1, "context": 4, "tokens": 4, "min_seconds": 0.001}
    seconds, timing = spent(decode_time, model, stepper=stepper, **sizes)
    assert seconds >= SLOW
    assert timing.p90 < SLOW
    seconds, generation = spent(
        generation_time, model, stepper=stepper, warmup=1, repeats=2, **sizes
    )
    assert seconds >= 3 * SLOW  # a generation each
    assert generation.total.median < SLOW


def slowed(monkeypatch, fast: bool) -> None:
    """Training steps whose first calls are slow, of a kind made for speed or a plain one."""
    real, made = TrainStep._run, TrainStep.__init__

    def init(self, model, optimizers, options):
        made(self, model, optimizers, dataclasses.replace(options, captured=fast))

    def run(self, batch):
        if self._done < WARMUP:
            time.sleep(SLOW)
        return real(self, batch)

    monkeypatch.setattr(TrainStep, "__init__", init)
    monkeypatch.setattr(TrainStep, "_run", run)
    monkeypatch.setattr(TrainStep, "_should_capture", lambda self, batch: False)


def test_training_seconds_are_without_the_first_steps_of_a_fast_run(data, monkeypatch) -> None:
    slowed(monkeypatch, fast=True)
    result = train(Builder.load().build(LAYOUT, seed=0), data, CONFIG)
    assert result.steps == 10
    assert result.preparing_seconds >= WARMUP * SLOW
    seconds = [point["seconds"] for point in result.curve]
    assert seconds == sorted(seconds)
    assert seconds[WARMUP - 1] < SLOW  # the making of batches alone
    assert result.seconds == seconds[-1]
    assert result.seconds < WARMUP * SLOW


def test_a_plain_run_prepares_nothing(data, monkeypatch) -> None:
    slowed(monkeypatch, fast=False)
    result = train(Builder.load().build(LAYOUT, seed=0), data, CONFIG)
    assert result.preparing_seconds == 0
    assert result.seconds >= WARMUP * SLOW


def test_a_resumed_run_adds_to_what_it_prepared_before(data, monkeypatch, tmp_path) -> None:
    slowed(monkeypatch, fast=True)
    checkpoint = tmp_path / "checkpoint.safetensors"
    often = dataclasses.replace(CONFIG, checkpoint_seconds=1e-9)

    class StopError(Exception):
        pass

    def stop(point: dict[str, float]) -> None:
        if point["step"] == 6:
            raise StopError

    model = Builder.load().build(LAYOUT, seed=0)
    with pytest.raises(StopError):
        train(model, data, often, checkpoint=checkpoint, progress=stop)
    result = train(model, data, often, checkpoint=checkpoint)
    assert result.preparing_seconds >= 2 * WARMUP * SLOW


def test_a_worker_says_what_its_start_took(tmp_path: Path, study_data) -> None:
    """It is ready with its imports behind it, which later collections leave alone."""
    config = make_config(study_data)
    plugins = used_plugins(config, default_builder(config.plugin_dirs))
    job = Job(config=config, device="cpu", cache_dir=tmp_path, plugins=plugins)
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROBED],
        input=json.dumps(job.to_dict()) + "\n",
        capture_output=True,
        text=True,
        check=True,
    )
    whole = time.monotonic() - started
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["seconds"]["imports"] > 0
    assert found["seconds"]["opening"] > 0
    assert sum(found["seconds"].values()) < whole
    assert found["enabled"]
    assert found["frozen"] > 10_000


PROBED = """
import gc, json, sys
from workbench.executors.base import Job
from workbench.executors.worker import open_place
seconds = {}
open_place(Job.from_dict(json.loads(sys.stdin.readline())), seconds)
print(json.dumps({"seconds": seconds, "enabled": gc.isenabled(), "frozen": gc.get_freeze_count()}))
"""
