"""`workbench export`: what it says, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.cli.conftest import TEXT_STUDY, Cli
from workbench.cli import export
from workbench.records import load_study
from workbench.study_config import StudyConfig


@pytest.fixture
def copied(notes: Path, tmp_path: Path) -> Path:
    """The runs folder of the notes, to be written to."""
    return shutil.copytree(notes, tmp_path / "copied")


def test_what_is_there_is_never_overwritten(cli: Cli, notes: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    message = cli("export", "notes:0", "mine", "--runs", notes).refused()
    assert "mine is there already: name a new folder" in message
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_text_says_how_to_load_it(cli: Cli, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.exporter import ExportReport

    def written(*arguments: object) -> ExportReport:
        return ExportReport(path=Path("out"), files=("config.json",), max_difference=3e-7)

    monkeypatch.setattr("workbench.export.export_trial", written)
    text = cli("export", "notes:0", "out", "--runs", notes).out
    assert text.startswith("out: 1 file; ")
    assert "differ by at most 3e-07" in " ".join(text.split())
    assert 'from_pretrained("out", trust_remote_code=True)' in text


@pytest.mark.slow
def test_what_it_prints_runs_as_it_is(cli: Cli, notes: Path, tmp_path: Path) -> None:
    """Text for a trial on text; token ids where the tokenizer is left out of it."""
    shown = cli("export", "notes:0", "some 'model'", "--runs", notes).out
    code = shown.partition("generates:\n\n")[2]
    assert "tokenizer.decode" in code
    (tmp_path / "snippet.py").write_text(code)
    made = python(tmp_path, "snippet.py")
    assert made.startswith("The ")
    assert len(made.encode(errors="replace")) > 40
    other = export._snippet(Path("some 'model'"), synthetic_config())
    (tmp_path / "snippet.py").write_text(other)
    assert json.loads(python(tmp_path, "snippet.py"))[:3] == [0, 1, 2]


def synthetic_config() -> StudyConfig:
    """A study of tokens that stand for no text."""
    data = tomllib.loads(TEXT_STUDY)
    return StudyConfig.from_dict({**data, "data": {"source": "mqar"}})


def python(folder: Path, file: str) -> str:
    """What a script prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, file],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(folder / "modules")},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["notes:7", "out"], "study 'notes' has no trial 7"),
        (["note:0", "out"], "Did you mean 'notes'?"),
        (["notes", "out"], "'notes' names no trial"),
        (["notes:0", "out", "--exporter", "hugginface"], "Did you mean 'huggingface'?"),
    ],
)
def test_names_that_nothing_has(cli: Cli, notes: Path, arguments: list[str], words: str) -> None:
    assert words in cli("export", *arguments, "--runs", notes).refused()
    assert not Path("out").exists()


def test_a_trial_without_weights(cli: Cli, copied: Path) -> None:
    (copied / "notes" / "trials" / "00000" / "model.safetensors").unlink()
    message = cli("export", "notes:0", "out", "--runs", copied).refused()
    assert "trial notes:0 (complete) left no weights" in message


def test_weights_of_another_layout(cli: Cli, copied: Path) -> None:
    layout = copied / "notes" / "trials" / "00000" / "layout.json"
    layout.write_text(layout.read_text().replace('"d_model": 16', '"d_model": 32'))
    assert "does not fit the layout" in cli("export", "notes:0", "out", "--runs", copied).refused()


def test_a_duplicate_names_its_original(cli: Cli, finished: Path) -> None:
    study = load_study("toys", finished)
    duplicates = [trial for trial in study.trials() if trial.outcome == "duplicate"]
    assert duplicates
    message = cli("export", duplicates[0].name, "out", "--runs", finished).refused()
    assert f"take toys:{duplicates[0].data['duplicate_of']}" in message


def test_a_place_that_cannot_be_written(cli: Cli, notes: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = cli("export", "notes:0", "file/model", "--runs", notes).refused()
    assert "cannot write file/model" in message
