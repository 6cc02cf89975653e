"""`workbench scale`: what it says and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from workbench.layout import Layout


def test_a_trial_is_scaled_and_its_file_described(cli: Cli, notes: Path, tmp_path: Path) -> None:
    made = cli(
        "scale", "notes:0", "--params", "3M", "--runs", notes, "--out", "large.json", "--json"
    )
    assert made.status == 0, made.err
    data = made.json
    assert abs(data["error"]) <= 0.02
    assert data["placement"] == "uniform with the trial's parameters"
    assert data["original"]["layout"]["d_model"] == 16
    described = cli("describe", "large.json", "--json").json
    for name in ("hash", "pattern", "parameters", "layout"):
        assert described[name] == data["scaled"][name]
    assert Layout.read(tmp_path / "large.json").to_dict() == data["scaled"]["layout"]


def test_text_puts_both_side_by_side(
    cli: Cli, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = cli("scale", "notes:0", "--params", "1.3B", "--context", "512", "--runs", notes).out
    assert max(map(len, text.splitlines())) <= 80
    assert "of the target. Placement: uniform" in text
    for row in ("d_model", "layers", "parameters", "weights", "state at 512", "FLOPs/token at 512"):
        assert f"\n{row} " in text


def test_a_layout_file_and_a_preset_are_scaled_too(cli: Cli, tmp_path: Path) -> None:
    preset = cli(
        "scale", "mamba-130m", "--params", "20M", "--vocab", "256", "--json", "--out", "a.json"
    )
    assert abs(preset.json["error"]) <= 0.02
    assert preset.json["scaled"]["layout"]["vocab_size"] == 256
    again = cli("scale", "a.json", "--params", "30M", "--depth", "20", "--json").json
    assert again["num_layers"] == 20


def test_a_miss_is_a_warning(cli: Cli, notes: Path) -> None:
    made = cli("scale", "notes:0", "--params", "1M", "--d-model", "256", "--runs", notes)
    assert made.status == 0
    assert "warning: the nearest to 1,000,000 parameters is " in made.err
    assert "of the target" in made.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["notes:9", "--params", "1M"], "has no trial 9"),
        (["nope:0", "--params", "1M"], "unknown study 'nope'"),
        (["notes:0", "--params", "1.3X"], "--params: '1.3X' is no number"),
        (["notes:0", "--params", "9"], "smaller than can be built"),
        (["notes:0", "--params", "1M", "--vocab", "0"], "--vocab: must be at least 1"),
        (["notes:0", "--params", "1M", "--depth", "0"], "--depth: must be from 1"),
        (["notes:0", "--params", "1M", "--export", "nope", "x"], "unknown exporter 'nope'"),
        (["notes:0", "--params", "60B", "--export", "huggingface", "x"], "of memory, and cpu has"),
        (["notes:0"], "Missing option '--params'"),
    ],
)
def test_mistakes_are_refused(cli: Cli, notes: Path, arguments: list[str], words: str) -> None:
    message = " ".join(cli("scale", *arguments, "--runs", notes).refused().split())
    assert words in message


def test_what_is_there_is_never_overwritten(cli: Cli, notes: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("{}")
    arguments = ("scale", "notes:0", "--params", "1M", "--runs", notes)
    assert "mine.json is there already" in cli(*arguments, "--out", "mine.json").refused()
    message = cli(*arguments, "--export", "huggingface", "mine.json").refused()
    assert "mine.json is there already" in message
    assert (tmp_path / "mine.json").read_text() == "{}"


@pytest.mark.slow
def test_an_export_says_that_it_is_not_trained(cli: Cli, notes: Path, tmp_path: Path) -> None:
    made = cli(
        "scale", "notes:0", "--params", "1M", "--runs", notes,
        "--export", "huggingface", "some model", "--json",
    )  # fmt: skip
    assert made.status == 0, made.err
    assert made.json["export"]["max_difference"] <= 1e-5
    card = (tmp_path / "some model" / "README.md").read_text()
    assert "It is not trained: its weights are random" in card
    assert "found and trained" not in card
    config = json.loads((tmp_path / "some model" / "config.json").read_text())
    assert Layout.from_dict(config["layout"]).hash == made.json["scaled"]["hash"]
    assert json.loads((tmp_path / "some model" / "workbench.json").read_text())["trained"] is False
