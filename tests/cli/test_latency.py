"""`workbench latency`: a table that predictions are made from, and how good they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli
from workbench.latency_machine import Load, Machine
from workbench.latency_table import LatencyTable
from workbench.measuring import Timing
from workbench.model import HybridLM

QUICK = ("--context", "4", "--fit", "3", "--check", "2", "--cover", "5", "--threads", "1")


@pytest.fixture(autouse=True)
def clockwork(monkeypatch: pytest.MonkeyPatch) -> list[Load]:
    """A clock that counts blocks and their width; lists what was timed."""
    timed: list[Load] = []

    def tick(self: Any, model: HybridLM, load: Load, *, cold: bool = False) -> Timing:
        timed.append(load)
        seconds = 1e-3 * load.batch_size * model.layout.d_model * (2 + len(model.layers))
        return Timing(median=seconds, p10=seconds, p90=seconds, repeats=2)

    monkeypatch.setattr("workbench.latency_filling.ModelTimer.__call__", tick)
    return timed


def test_a_study_s_layers_are_measured_once(
    cli: Cli, toy_study: Path, clockwork: list[Load]
) -> None:
    result = cli("latency", toy_study, *QUICK, "--batch", "1,2", "--json")
    assert result.status == 0
    data = result.json
    assert data["failed"] == {}
    assert data["measured"] == data["entries"] > 0
    assert data["fitted_to"] == 6  # three layouts at two batch sizes, of each phase
    table = LatencyTable.read(Path(data["table"]))
    assert table.machine == Machine.here("cpu", threads=1)
    assert data["machine"] == table.machine.to_dict()
    assert {load for _, load in table.entries} == set(clockwork)
    assert {(load.phase, load.batch_size, load.length) for load in clockwork} == {
        (phase, batch, 4) for phase in ("prefill", "decode") for batch in (1, 2)
    }
    clockwork.clear()
    again = cli("latency", toy_study, *QUICK, "--batch", "1,2", "--json").json
    assert again["measured"] == 0
    assert again["entries"] == data["entries"]
    assert again["corrected"] == data["corrected"]
    assert clockwork == []


def test_predicted_and_measured_have_names_of_their_own(cli: Cli, toy_study: Path) -> None:
    data = cli("latency", toy_study, *QUICK, "--json").json
    for kind in ("uncorrected", "corrected"):
        evaluations = data[kind]
        assert [e["phase"] for e in evaluations] == ["decode", "prefill"]
        for evaluation in evaluations:
            assert evaluation["layouts"] == len(evaluation["rows"]) == 2
            assert evaluation["unknown"] == 0
            assert evaluation["mape"] == pytest.approx(0, abs=1e-6)  # the clock is additive
            for row in evaluation["rows"]:
                assert row["predicted_ms"] == pytest.approx(row["measured_ms"])
    assert data["environment"]["threads"] == 1


def test_the_report_says_how_good_predictions_are(cli: Cli, toy_study: Path) -> None:
    text = cli("latency", toy_study, *QUICK).out
    for words in ("MAPE of sums", "Kendall τ", "corrected by 3 whole models", "1 thread"):
        assert words in text
    assert str(Path("runs") / ".cache" / "latency") in text
    assert "0.0%" in text
    text = cli("latency", toy_study, *QUICK, "--check", "0").out
    assert "raise --check" in text


def test_a_layout_judges_only_itself(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "layout.json"
    blocks = [{"layer": "swiglu"}, {"layer": "mamba"}]
    path.write_text(json.dumps({"d_model": 32, "vocab_size": 64, "blocks": blocks}))
    data = cli("latency", path, "--device", "cpu", "--context", "4", "--json").json
    assert data["fitted_to"] == 0
    assert [e["layouts"] for e in data["corrected"]] == [1, 1]
    assert data["entries"] == 2 * 3


def test_parts_that_cannot_be_told_are_named(
    cli: Cli, toy_study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def still(self: Any, model: HybridLM, load: Load, *, cold: bool = False) -> Timing:
        return Timing(median=1.0, p10=1.0, p90=1.0, repeats=2)

    monkeypatch.setattr("workbench.latency_filling.ModelTimer.__call__", still)
    result = cli("latency", toy_study, *QUICK)
    assert result.status == 0
    assert "Not measured: toy(" in result.out
    assert "more copies were not slower" in result.out


def test_the_metric_reads_the_table(cli: Cli, toy_study: Path) -> None:
    """A study that is judged by what it predicts; without the table its trials say what to do."""
    text = toy_study.read_text().replace(
        'report = ["toy_depth"]', 'report = ["toy_depth", "predicted_decode_ms"]'
    )
    toy_study.write_text(
        text + "\n[metrics.predicted_decode_ms]\ncontext = 4\nbatch_size = 2\nthreads = 1\n"
    )
    cli("latency", toy_study, *QUICK, "--batch", "2", "--cover", "40")
    assert cli("run", toy_study).status == 0
    data = cli("show", "toys", "--all", "--json").json
    judged = [record for record in data["records"] if record["outcome"] == "complete"]
    assert judged
    for record in judged:
        blocks = len(record["pattern"])
        width = record["params"]["d_model"]
        figure = record["metrics"]["predicted_decode_ms"]
        assert figure == pytest.approx(2 * width * (2 + blocks), rel=1e-3)
        assert "predicted_decode_ms.fitted_to" in json.dumps(record)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--context", "0"], "--context: must be at least 1"),
        (["--batch", "many"], "Invalid value for '--batch'"),
        (["--fit", "-1"], "--fit: must be at least 0"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--device", "gpu"], "'gpu' is no device"),
    ],
)
def test_options_that_make_no_sense(
    cli: Cli, toy_study: Path, options: list[str], words: str
) -> None:
    assert words in cli("latency", toy_study, *options).refused()


def test_a_study_that_is_not_there(cli: Cli) -> None:
    assert "cannot read the study file" in cli("latency", "none.toml").refused()


def test_a_space_that_cannot_be_built_says_what_refuses_it(cli: Cli, toy_study: Path) -> None:
    text = toy_study.read_text().replace("d_model = [8, 12, 16]", "d_model = 30")
    text = text.replace('mixers = ["toy", "other"]', 'mixers = ["attention", "mamba2"]')
    text += "\n[space.layers.attention]\nnum_heads = [4, 7]\n[space.layers.mamba2]\nheaddim = 64\n"
    toy_study.write_text(text)
    message = cli("latency", toy_study, "--fit", "1", "--check", "1", "--cover", "1").refused()
    first, *causes, last = message.splitlines()
    assert first.endswith("toys.toml: none of 60 layouts drawn can be built. What refused them:")
    counts = [int(cause.partition(" × ")[0]) for cause in causes]
    assert sum(counts) == 60
    assert counts == sorted(counts, reverse=True)
    assert {cause.partition(" × ")[2].partition(", such as: blocks[0]")[0] for cause in causes} == {
        "[space.layers.attention] num_heads",
        "[space.layers.mamba2] headdim",
    }
    assert last == "Change that in the file."
