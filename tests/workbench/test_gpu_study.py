"""studies/hybrid_gpu.toml: right on any machine, and running, shrunken, on a CPU."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections import Counter
from pathlib import Path

import optuna
import pytest

from benchmarks.study_summary import summary
from workbench.builder import Builder
from workbench.errors import FieldError
from workbench.layout import Layout
from workbench.space import Space
from workbench.study import run_study
from workbench.study_config import StudyConfig
from workbench.trial import make_metrics, make_training

FILE = Path(__file__).parents[2] / "studies" / "hybrid_gpu.toml"
BYTES = 256  # the vocabulary
SENTENCE = "Call me Ishmael. Some years ago, never mind how long precisely. "


@pytest.fixture(scope="module")
def builder() -> Builder:
    return Builder.load()


@pytest.fixture(scope="module")
def layouts(builder: Builder) -> list[Layout]:
    """What random suggestions give, those that can be built."""
    space = Space(StudyConfig.read(FILE).space, builder, BYTES)
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(sampler=sampler)
    found = []
    for _ in range(200):
        try:
            found.append(space.suggest(study.ask()))
        except FieldError:
            continue
    return found


def test_every_name_and_field_is_right(builder: Builder) -> None:
    config = StudyConfig.read(FILE)
    assert config.name == FILE.stem
    training = make_training(config)
    assert training.batch_size * training.seq_len == 2**15
    metrics = make_metrics(config, builder)
    assert {name: metric.stage for name, metric in metrics.items()} == {
        "perplexity": "quantized",
        "decode_ms": "measured",
        "peak_memory_bytes": "measured",
        "bits_per_byte": "quantized",
        "memory_bytes": "static",
        "parameters": "static",
    }


def test_most_suggestions_can_be_built_and_many_are_of_the_wanted_size(
    builder: Builder, layouts: list[Layout]
) -> None:
    bounds = StudyConfig.read(FILE).constraints["parameters"]
    counts = [builder.costs(layout, length=1).total.parameters for layout in layouts]
    assert len(layouts) >= 130
    assert sum(bounds.violation(count) <= 0 for count in counts) >= 60


def test_sizes_are_multiples_that_tensor_cores_like(layouts: list[Layout]) -> None:
    seen = Counter(block.layer for layout in layouts for block in layout.blocks)
    assert set(seen) == {"mamba2", "mamba", "attention", "swiglu"}
    for layout in layouts:
        assert layout.d_model % 128 == 0
        assert layout.vocab_size % 64 == 0
        for block in layout.blocks:
            config = block.config
            assert config.get("head_dim", 64) in (64, 128)
            assert config.get("headdim", 64) in (64, 128)
            if block.layer == "swiglu":
                assert config["expand"] * layout.d_model % 128 == 0


def test_few_kinds_of_blocks_are_to_be_compiled(layouts: list[Layout]) -> None:
    kinds = {
        (layout.d_model, block.layer, repr(block.config))
        for layout in layouts
        for block in layout.blocks
    }
    assert len(kinds) <= 32


def test_without_text_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = StudyConfig.read(FILE)
    on_cpu = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, device="cpu"))
    with pytest.raises(FieldError, match=r"no file matches 'data/text/\*\.txt'"):
        run_study(on_cpu, tmp_path / "runs")
    assert not (tmp_path / "runs" / config.name).exists()


@pytest.mark.slow
def test_shrunken_it_runs_on_a_cpu_and_is_summed_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own mixers, placements and data, smaller; counted memory stands in for the peak."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "text").mkdir(parents=True)
    (tmp_path / "data" / "text" / "book.txt").write_text(SENTENCE * 400)
    data = tomllib.loads(FILE.read_text(encoding="utf-8"))
    data["objectives"] = ["perplexity", "decode_ms", "memory_bytes"]
    data["report"] = ["bits_per_byte"]
    del data["metrics"]["peak_memory_bytes"]
    data["metrics"]["decode_ms"]["context"] = 32
    data["constraints"] = {"parameters": {"max": 20_000_000}}
    data["space"] |= {"d_model": [128], "num_layers": [2, 3]}
    data["training"] |= {"tokens": 512, "batch_size": 2, "seq_len": 64, "record_every": 1}
    data["budget"] = {"trials": 3}
    data["runtime"] = {"device": "cpu", "threads": 1}
    study = run_study(StudyConfig.from_dict(data), tmp_path / "runs")
    complete = [trial for trial in study.trials() if trial.outcome == "complete"]
    assert len(complete) == 3
    for trial in complete:
        details = trial.data["details"]
        assert math.isfinite(trial.metrics["perplexity"])
        assert details["preparing_seconds"]["measured"] > 0  # warm-up steps
        assert details["preparing_seconds"]["training"] == 0  # nothing is compiled on a CPU
        assert 0 < details["training_seconds"] <= trial.data["stage_seconds"]["training"]
    page = summary(study)
    assert f"{len(study.trials())} suggestions: " in page
    assert "3 complete" in page
    for trial in study.front_trials():
        assert f"`{trial.pattern}`" in page
