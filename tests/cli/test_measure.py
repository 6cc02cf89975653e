"""`workbench measure`: figures with their device, and what does not fit said beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Cli
from workbench.builder import Builder
from workbench.records import load_study

QUICK = ("--context", "8", "--tokens", "2", "--device", "cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls are enough to see what is reported of them."""

    def shortened(function: object, **options: object) -> object:
        options.update(repeats=2, warmup=0, min_seconds=0.0)
        return time_calls(function, **options)  # type: ignore[arg-type]

    from workbench.measuring import time_calls

    monkeypatch.setattr("workbench.measuring.time_calls", shortened)


def test_figures_come_with_device_and_versions(cli: Cli, finished: Path) -> None:
    trial = load_study("toys", finished).front_trials()[0]
    result = cli("measure", trial.name, "--runs", finished, *QUICK, "--threads", "1", "--json")
    assert result.status == 0
    data = result.json
    assert data["layout_hash"] == trial.layout.hash
    assert data["pattern"] == trial.pattern
    assert data["prefill_ms"] > 0
    assert data["decode_ms"] > 0
    assert data["decode_tokens_per_second"] == pytest.approx(1000 / data["decode_ms"])
    environment = data["environment"]
    assert environment["device"] == "cpu"
    assert environment["threads"] == 1
    assert environment["versions"]["torch"] == torch.__version__
    text = cli("measure", trial.name, "--runs", finished, *QUICK).out
    for fact in (environment["device_name"], "1 thread", torch.__version__, "random weights"):
        assert fact in text


def test_batches_make_more_tokens_a_second(cli: Cli, finished: Path) -> None:
    name = load_study("toys", finished).front_trials()[0].name
    data = cli("measure", name, "--runs", finished, *QUICK, "--batch-size", "3", "--json").json
    assert data["batch_size"] == 3
    assert data["decode_tokens_per_second"] == pytest.approx(3000 / data["decode_ms"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--context", "0"], "--context: must be at least 1"),
        (["--batch-size", "0"], "--batch-size: must be at least 1"),
        (["--tokens", "0"], "--tokens: must be at least 1"),
        (["--threads", "0"], "--threads: must be at least 1"),
        (["--device", "gpu"], "'gpu' is no device"),
        (["--device", "cuda:99"], "cuda:99"),
    ],
)
def test_options_that_make_no_sense(cli: Cli, options: list[str], words: str) -> None:
    assert words in cli("measure", "mamba-130m", *options).refused()


def test_what_is_too_large_is_refused_before_it_is_built(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("built")

    monkeypatch.setattr(Builder, "build", never)
    layout = {"d_model": 2**16, "vocab_size": 2**24, "blocks": [{"layer": "swiglu"}]}
    path = tmp_path / "large.json"
    path.write_text(json.dumps(layout))
    parameters = cli("describe", path, "--json").json["parameters"]
    message = cli("measure", path).refused()
    assert f"needs at least {4 * parameters / 2**40:#.4g} TiB of memory, and cpu has " in message
    assert "--context" in message
    # States count, too: twice, for decoding starts again from a copy.
    monkeypatch.setattr("workbench.cli.memory.available_memory", lambda device: 10**9)
    assert "GiB" in cli("measure", "mamba-glm-tiny", "--context", "1000000").refused()


def test_an_allocator_that_fails_is_explained(
    cli: Cli, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starve(*arguments: object, **options: object) -> None:
        torch.empty(2**50)

    monkeypatch.setattr(Builder, "build", starve)
    message = cli("measure", "mamba-130m", *QUICK).refused()
    assert "out of memory (an allocation of 4,503,599,627,370,496 bytes failed)" in message
    assert "--batch-size" in message
