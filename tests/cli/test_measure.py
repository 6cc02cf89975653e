"""`workbench measure`: figures with their device, and what does not fit said beforehand."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.conftest import Cli
from workbench.builder import Builder
from workbench.records import Trial, load_study

QUICK = ("--context", "8", "--tokens", "2", "--device", "cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls, and small ceilings, are enough to see what is reported of them."""

    def shortened(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        options.update(repeats=2, warmup=0, min_seconds=0.0)
        return function(*arguments, **options)

    for name in ("roofline.time_calls", "measuring_generation.generation_time"):
        module, _, function = f"workbench.{name}".rpartition(".")
        real = getattr(importlib.import_module(module), function)
        monkeypatch.setattr(f"{module}.{function}", partial(shortened, real))
    monkeypatch.setattr("workbench.roofline.COPIED", {"cpu": 2**20})
    monkeypatch.setattr("workbench.roofline.SIDE", {"cpu": 64})


def first_trial(runs: Path) -> Trial:
    return load_study("toys", runs).front_trials()[0]


def test_figures_come_with_device_and_versions(cli: Cli, finished: Path, tmp_path: Path) -> None:
    runs = shutil.copytree(finished, tmp_path / "runs")  # ceilings are kept beside the studies
    trial = first_trial(runs)
    result = cli("measure", trial.name, "--runs", runs, *QUICK, "--threads", "1", "--json")
    assert result.status == 0
    data = result.json
    assert data["layout_hash"] == trial.layout.hash
    assert data["pattern"] == trial.pattern
    assert data["dtype"] == "float32"
    (point,) = data["points"]
    assert (point["batch_size"], point["context"]) == (1, 8)
    environment = data["environment"]
    assert environment["device"] == "cpu"
    assert environment["threads"] == 1
    assert environment["versions"]["torch"] == torch.__version__
    text = cli("measure", trial.name, "--runs", runs, *QUICK).out
    for fact in (environment["device_name"], "1 thread", torch.__version__, "float32 weights"):
        assert fact in text
    assert len(list((runs / ".cache" / "latency").glob("ceilings-*.json"))) == 1


def test_measured_bounds_and_shares_have_names_of_their_own(
    cli: Cli, finished: Path, tmp_path: Path
) -> None:
    runs = shutil.copytree(finished, tmp_path / "runs")
    data = cli("measure", first_trial(runs).name, "--runs", runs, *QUICK, "--json").json
    (point,) = data["points"]
    ceilings = data["ceilings"]
    for name in ("ttft", "tpot"):
        measured, bound = point[f"{name}_ms"], point[f"{name}_bound_ms"]
        assert measured > 0
        assert bound > 0
        assert point[f"{name}_gap"] == pytest.approx(measured / bound)
        shares = point[f"{name}_mfu"], point[f"{name}_mbu"]
        assert max(shares) == pytest.approx(bound / measured)
        assert point[f"{name}_noisy"] == (point[f"{name}_spread"] > 0.05)
    assert point["peak_bytes"] is point["reserved_bytes"] is None
    assert ceilings["bytes_per_second"] > 0
    headings = [
        line.split()
        for line in cli("measure", first_trial(runs).name, "--runs", runs, *QUICK).out.splitlines()
        if "bound ms" in line
    ]
    common = ["batch", "context", "{} ms", "bound ms", "gap", "MFU", "MBU", "spread"]
    assert [" ".join(heading) for heading in headings] == [
        " ".join(common).format("TTFT"),
        " ".join([*common, "tokens/s"]).format("TPOT"),
    ]


def test_a_grid_has_a_row_a_batch_and_context(cli: Cli, finished: Path, tmp_path: Path) -> None:
    runs = shutil.copytree(finished, tmp_path / "runs")
    options = ("--batch", "1,3", "--context", "4,8,4")
    name = first_trial(runs).name
    data = cli("measure", name, "--runs", runs, *QUICK, *options, "--json").json
    sizes = [(point["batch_size"], point["context"]) for point in data["points"]]
    assert sizes == [(1, 4), (3, 4), (1, 8), (3, 8)]
    assert all(point["tokens_per_second"] > 0 for point in data["points"])
    text = cli("measure", name, "--runs", runs, *QUICK, *options).out
    rows = re.findall(r"^ +(1|3) +(4|8) ", text, flags=re.M)
    assert rows == 2 * [("1", "4"), ("3", "4"), ("1", "8"), ("3", "8")]


def test_fewer_bytes_an_element_lower_the_bound(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "layout.json"
    path.write_text(json.dumps({"d_model": 64, "vocab_size": 64, "blocks": [{"layer": "swiglu"}]}))
    work = {}
    for dtype in ("float32", "bfloat16"):
        data = cli("measure", path, *QUICK, "--dtype", dtype, "--json").json
        assert data["dtype"] == dtype
        assert data["steps"] == "eager"
        share = data["points"][0]["tpot_mbu"] * data["points"][0]["tpot_ms"]
        work[dtype] = share * data["ceilings"]["bytes_per_second"]
    assert work["bfloat16"] == pytest.approx(work["float32"] / 2)


def test_steps_that_cannot_be_captured_are_refused(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "layout.json"
    path.write_text(json.dumps({"d_model": 64, "vocab_size": 64, "blocks": [{"layer": "swiglu"}]}))
    message = cli("measure", path, *QUICK, "--steps", "cuda-graph").refused()
    assert "cannot be captured" in message
    assert "unknown way to run steps" in cli("measure", path, "--steps", "fast").refused()


def test_batch_size_is_another_name_of_batch(cli: Cli, finished: Path, tmp_path: Path) -> None:
    runs = shutil.copytree(finished, tmp_path / "runs")
    name = first_trial(runs).name
    data = cli("measure", name, "--runs", runs, *QUICK, "--batch-size", "3", "--json").json
    assert [point["batch_size"] for point in data["points"]] == [3]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--context", "0"], "--context: must be at least 1"),
        (["--batch", "1,0"], "--batch: must be at least 1"),
        (["--batch", "1;2"], "Invalid value for '--batch': '1;2' is no list of whole numbers"),
        (["--context", ""], "Invalid value for '--context'"),
        (["--tokens", "1"], "--tokens: must be at least 2"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
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
    # States count, too.
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
    assert "--batch" in message
