"""`workbench train`: one layout, resumable, and refused where it would harm what is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.conftest import TOYS, Cli, Result
from workbench.records import load_study

LAYOUT = {"d_model": 8, "vocab_size": 16, "blocks": [{"layer": "toy"}]}
SMALL = ("--tokens", "512", "--seq-len", "16", "--batch-size", "4", "--device", "cpu")
COUNTING = ("--plugin-dir", str(TOYS), "--data", "counting")


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    path = tmp_path / "layout.json"
    path.write_text(json.dumps(LAYOUT))
    return path


def train(cli: Cli, layout: str | Path, out: str = "out", *options: str | Path) -> Result:
    return cli("train", layout, out, *SMALL, *COUNTING, *options)


def test_a_run_leaves_layout_curve_and_weights(cli: Cli, layout: Path) -> None:
    result = train(cli, layout)
    assert result.status == 0
    assert "bits a byte" in result.out
    assert {path.name for path in Path("out").iterdir()} == {
        "layout.json", "run.json", "training.json", "model.safetensors",
    }  # fmt: skip
    record = json.loads(Path("out/training.json").read_text())
    assert [point["step"] for point in record["curve"]] == list(range(1, 9))
    assert record["tokens"] == 512
    assert record["environment"]["versions"]["torch"]
    assert f"{record['validation_loss']:.4f} nats" in result.out
    # A finished run is never trained over.
    before = Path("out/model.safetensors").read_bytes()
    assert "holds a trained model already" in train(cli, layout).refused()
    assert Path("out/model.safetensors").read_bytes() == before


def test_a_long_run_is_not_silent_in_a_file(
    cli: Cli, layout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(cli, layout, "quick").err == ""
    monkeypatch.setattr("workbench.cli.common.SILENCE", 0.0)
    lines = train(cli, layout).err.splitlines()
    assert len(lines) == 8
    assert re.fullmatch(r"training, step 3 of 8, loss \d\.\d{3}", lines[2])


def test_same_seed_same_weights_other_seed_others(cli: Cli, layout: Path) -> None:
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert train(cli, layout, out, "--seed", seed).status == 0
    a, b, c = (Path(out, "model.safetensors").read_bytes() for out in "abc")
    assert a == b
    assert a != c


def test_json(cli: Cli, layout: Path) -> None:
    data = train(cli, layout, "out", "--json").json
    record = json.loads(Path("out/training.json").read_text())
    del record["curve"]
    assert data == {**record, "path": "out"}


def test_a_trial_is_a_layout_with_the_plugins_of_its_study(cli: Cli, finished: Path) -> None:
    trial = load_study("toys", finished).front_trials()[0]
    options = ("--data", "counting", "--runs", finished)
    assert cli("train", trial.name, "out", *SMALL, *options).status == 0
    assert json.loads(Path("out/layout.json").read_text()) == trial.layout.to_dict()


def test_an_unfinished_run_goes_on_only_as_the_same_run(cli: Cli, layout: Path) -> None:
    assert train(cli, layout).status == 0
    Path("out/model.safetensors").unlink()
    message = train(cli, layout, "out", "--lr", "0.1").refused()
    assert "out holds an unfinished run with another training" in message
    message = train(cli, layout, "out", "--data-option", "vocab_size=8", "--seed", "3").refused()
    assert "another data and another seed" in message
    assert train(cli, layout).status == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "countin"], "unknown data source 'countin'. Did you mean 'counting'?"),
        (["--data-option", "vocab=3"], "field of --data-option 'vocab'. Did you mean 'vocab_size'"),
        (["--data-option", "vocab_size=many"], "--data-option 'vocab_size=\"many\"'"),
        (["--data-option", 'vocab_size="8"'], "--data-option.vocab_size: expected int, got '8'"),
        (["--data-option", "vocab_size"], "Write KEY=VALUE with a TOML value"),
        (["--data-option", "vocab_size=99"], "vocab_size: the layout has 16 rows and counting"),
        (["--tokens", "5"], "--tokens: 5 are fewer than one step's 64"),
        (["--batch-size", "0"], "--batch-size: must be at least 1"),
        (["--lr", "0"], "--lr: must be above 0"),
        (["--lr", "nan"], "--lr: must be a finite number"),
        (["--optimizer", "sgd"], "--optimizer: 'sgd' is none of ['muon', 'adamw']"),
        (["--precision", "int8"], "--precision: 'int8' is none of"),
        (["--checkpoint-seconds", "-1"], "--checkpoint-seconds: must not be negative"),
        (["--device", "gpu"], "'gpu' is no device"),
    ],
)
def test_mistakes_leave_no_folder(cli: Cli, layout: Path, options: list[str], words: str) -> None:
    assert words in train(cli, layout, "out", *options).refused()
    assert not Path("out").exists()


def test_folders_that_are_not_new(cli: Cli, layout: Path, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "love.txt").write_text("mine")
    assert "OUT: letters is not empty" in train(cli, layout, "letters").refused()
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["love.txt"]
    assert "cannot make the folder" in train(cli, layout, "letters/love.txt").refused()
    assert "cannot make the folder" in train(cli, layout, "letters/love.txt/x").refused()
    (tmp_path / "empty").mkdir()
    assert train(cli, layout, "empty").status == 0


def test_a_damaged_checkpoint_is_named(cli: Cli, layout: Path) -> None:
    assert train(cli, layout).status == 0
    Path("out/model.safetensors").unlink()
    Path("out/checkpoint.safetensors").write_text("garbage")
    message = train(cli, layout).refused()
    assert "out/checkpoint.safetensors" in message
    assert "delete it" in message


def test_divergence_is_no_traceback(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "diverges.json"
    path.write_text(json.dumps({**LAYOUT, "blocks": [{"layer": "diverges"}]}))
    message = train(cli, path).refused()
    assert "training diverged: loss is nan at step 1. Lower --lr." in message


def test_what_is_too_large_is_refused_before_it_is_built(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    path.write_text(json.dumps({**LAYOUT, "d_model": 2**24}))
    assert "needs at least" in train(cli, path).refused()
    assert not Path("out").exists()


def test_a_launcher_that_says_too_little_or_too_much_is_refused(
    cli: Cli, layout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train(cli, layout, "alone", "--json").json["processes"] == 1  # a cluster's own
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert "--precision bfloat16 if that" in train(cli, layout).refused()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("LOCAL_RANK", "0")
    message = train(cli, layout).refused()
    assert "start the processes with accelerate launch or torchrun" in message
    assert not Path("out").exists()


def test_how_a_run_ran_is_recorded_and_part_of_it(cli: Cli, layout: Path) -> None:
    record = train(cli, layout, "out", "--json").json
    assert (record["mode"], record["note"]) == ("eager", "")
    assert record["backend"] == {"toy": {}}
    assert record["training"]["compile"] == record["training"]["cuda_graph"] == "auto"
    assert record["training"]["checkpoint_blocks"] is False
    options = ("--no-compile", "--no-cuda-graph", "--checkpoint-blocks")
    other = train(cli, layout, "other", *options, "--json").json
    assert other["training"]["compile"] == other["training"]["cuda_graph"] == "off"
    assert other["training"]["checkpoint_blocks"] is True
    assert other["validation_loss"] == record["validation_loss"]  # less memory, the same weights
