"""`workbench generate`: what the model says, whole characters only."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Cli
from workbench.cli.generate import LONG, _captures
from workbench.export import trial_builder
from workbench.generation import generate
from workbench.model import HybridLM
from workbench.records import load_study, load_trial
from workbench.trial import load_trained, make_data

PROMPT = "Das Wörterb"


@pytest.fixture(scope="module")
def trained(notes: Path) -> HybridLM:
    trial = load_trial("notes:0", notes)
    builder, _ = trial_builder(trial)
    return load_trained(builder, trial.layout, trial.weights)


def test_greedy_is_what_the_model_generates(cli: Cli, notes: Path, trained: HybridLM) -> None:
    ids = list(PROMPT.encode())
    expected = generate(trained, torch.tensor([ids]), 24)[0, len(ids) :].tolist()
    options = ("--runs", notes, "--temperature", "0", "--max-new-tokens", "24")
    result = cli("generate", "notes:0", "--prompt", PROMPT, *options, "--json")
    assert result.json["tokens"] == expected
    assert result.json["prompt"] == PROMPT
    text = bytes(expected).decode(errors="replace").rstrip("\ufffd")
    assert result.json["text"] == text
    assert cli("generate", "notes:0", "--prompt", PROMPT, *options).out == f"{PROMPT}{text}\n"


def test_draws_depend_on_the_seed_alone(cli: Cli, notes: Path) -> None:
    def tokens(*options: str) -> list[int]:
        command = ("generate", "notes:0", "--prompt", "D", "--runs", notes, "--json")
        made: list[int] = cli(*command, "--max-new-tokens", "12", *options).json["tokens"]
        return made

    assert tokens("--seed", "1") == tokens("--seed", "1")
    assert tokens("--seed", "1") != tokens("--seed", "2")
    assert tokens("--top-k", "1") == tokens("--temperature", "0")
    assert tokens("--top-p", "0.0001") == tokens("--temperature", "0")


def test_no_piece_of_a_character_is_written(
    cli: Cli, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bytes: characters of one to four of them, an invalid one, and half a character."""
    planted = "aé–𝄞z".encode() + b"\xff" + "ü".encode() + "é".encode()[:1]

    def bytes_planted(*arguments: object, **options: object) -> object:
        yield from (torch.tensor([byte]) for byte in planted)

    monkeypatch.setattr("workbench.generation.stream", bytes_planted)
    written: list[str] = []
    monkeypatch.setattr("sys.stdout.write", written.append)
    status = cli("generate", "notes:0", "--prompt", "x", "--runs", notes).status
    assert status == 0
    assert [piece for piece in written if piece] == ["x", "a", "é", "–", "𝄞", "z", "\ufffdü", "\n"]


def test_control_characters_do_not_reach_a_terminal(
    cli: Cli, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def escape(*arguments: object, **options: object) -> object:
        yield from (torch.tensor([byte]) for byte in b"\x1b[2J\ta\n")

    monkeypatch.setattr("workbench.generation.stream", escape)
    command = ("generate", "notes:0", "--prompt", "x", "--runs", notes)
    assert cli(*command).out == "x\x1b[2J\ta\n\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert cli(*command).out == "x\ufffd[2J\ta\n\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", ""], "--prompt: is empty"),
        (["--prompt", "\udcff"], "--prompt: is not UTF-8"),
        (["--max-new-tokens", "0"], "--max-new-tokens: must be at least 1"),
        (["--temperature", "-1"], "--temperature: must not be negative"),
        (["--top-k", "0"], "--top-k: must be at least 1"),
        (["--top-p", "0"], "--top-p: must be above 0"),
        (["--top-p", "1.5"], "--top-p: must be above 0 and at most 1"),
        (["--device", "gpu"], "'gpu' is no device"),
    ],
)
def test_options_that_make_no_sense(cli: Cli, notes: Path, options: list[str], words: str) -> None:
    prompt = [] if "--prompt" in options else ["--prompt", "x"]
    assert words in cli("generate", "notes:0", *prompt, *options, "--runs", notes).refused()


def test_trials_that_cannot_speak(cli: Cli, notes: Path, finished: Path) -> None:
    def refused(name: str, runs: Path) -> str:
        return cli("generate", name, "--prompt", "x", "--runs", runs).refused()

    assert "has no trial 9" in refused("notes:9", notes)
    assert "Did you mean 'notes'?" in refused("note:0", notes)
    assert "names no trial" in refused("mamba-130m", notes)
    best = load_study("toys", finished).front_trials()[0]
    assert "holds no text" in refused(best.name, finished)


def test_a_model_without_weights_says_why(cli: Cli, notes: Path, tmp_path: Path) -> None:
    runs = shutil.copytree(notes, tmp_path / "runs")
    weights = runs / "notes" / "trials" / "00000" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    command = ("generate", "notes:0", "--prompt", "x", "--runs", runs)
    assert f"cannot read the weights {weights}" in cli(*command).refused()
    weights.unlink()
    assert "left no weights" in cli(*command).refused()


def test_the_data_decodes_what_it_encodes(notes: Path) -> None:
    trial = load_trial("notes:0", notes)
    builder, config = trial_builder(trial)
    data = make_data(config, builder, notes / ".cache")
    assert data.decode(data.encode(PROMPT)) == PROMPT


def test_a_cpu_cannot_capture_steps_and_is_not_asked_to(cli: Cli, notes: Path) -> None:
    command = ("generate", "notes:0", "--prompt", "D", "--runs", notes, "--device", "cpu")
    long = ("--max-new-tokens", str(LONG))
    assert cli(*command, *long, "--json").json["captured"] is False
    assert not cli(*command, "--no-capture", "--max-new-tokens", "2", "--json").json["captured"]
    result = cli(*command, "--capture", "--max-new-tokens", "4")
    assert result.status == 2
    assert "cannot be captured as a CUDA graph: CUDA graphs need a CUDA device" in result.err


def test_long_generations_on_a_cuda_device_are_captured_where_that_works(
    monkeypatch: pytest.MonkeyPatch, trained: HybridLM
) -> None:
    monkeypatch.setattr(HybridLM, "init_state", lambda *_: [])
    reasons = {"": True, "it waits for the device": False}
    for reason, expected in reasons.items():
        monkeypatch.setattr("workbench.decoding.why_not_captured", lambda *_, r=reason: r)
        monkeypatch.setattr(HybridLM, "device", torch.device("cuda"))
        assert _captures(trained, LONG) is expected
        assert not _captures(trained, LONG - 1)
        monkeypatch.setattr(HybridLM, "device", torch.device("cpu"))
        assert not _captures(trained, LONG)
