"""`workbench show`: tables that fit, JSON, names, and records that someone damaged."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli
from workbench.records import load_study


def record(folder: Path, number: int, **data: Any) -> None:
    path = folder / "trials" / f"{number:05d}"
    path.mkdir(parents=True)
    (path / "trial.json").write_text(json.dumps({"number": number, **data}))


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A runs folder with a study of many metrics, long names and long patterns."""
    units = {
        "bits_per_byte": "bits/byte", "decode_ms": "ms", "memory_bytes": "bytes",
        "perplexity": "per token", "bits_per_byte_unquantized": "bits/byte",
        "parameters": "parameters",
    }  # fmt: skip
    folder = tmp_path / "runs" / "wide"
    folder.mkdir(parents=True)
    objectives = [
        {"name": name, "unit": units[name], "direction": "minimize"} for name in list(units)[:3]
    ]
    data = {"name": "wide", "objectives": objectives, "units": units}
    (folder / "study.json").write_text(json.dumps(data))
    for number in range(3):
        metrics = {
            "bits_per_byte": 2.5 + number, "decode_ms": 1234.5 / 10**number,
            "memory_bytes": 1023 * 2**20 + number, "perplexity": 7.78,
            "bits_per_byte_unquantized": 2.4, "parameters": 123_456_789,
        }  # fmt: skip
        record(
            folder,
            number,
            outcome="complete",
            metrics=metrics,
            params={"quantizer": "int4"},
            pattern="M-M-M-A-" * 4 * (number + 1),
        )
    record(folder, 3, outcome="infeasible", reason="blocks[3] (attention).num_heads: [a] " * 5)
    return tmp_path / "runs"


@pytest.mark.parametrize("columns", [60, 80, 100, 120, 200])
@pytest.mark.parametrize("arguments", [["wide"], ["wide", "--all"], ["wide:0"], ["wide:3"], []])
def test_every_line_fits_and_figures_stay_whole(
    cli: Cli, wide: Path, columns: int, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.chdir(wide.parent)
    result = cli("show", *arguments, "--runs", "runs")
    assert result.status == 0
    assert max(map(len, result.out.splitlines())) <= columns
    if arguments in (["wide"], ["wide", "--all"]):
        whole = ["2.500", "1,234", "123.5", "(M-M-M-A-)×12"]
        whole += ["1023 MiB"] if columns >= 80 else []
        for figure in whole:
            assert figure in result.out
    if "--all" in arguments or arguments == ["wide:3"]:
        assert "[a]" in result.out  # no markup


def test_a_narrow_front_says_what_it_left_out(
    cli: Cli, wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = " ".join(cli("show", "wide", "--runs", wide).out.split())
    assert "No room for bits_per_byte_unquantized, parameters: widen the terminal" in text
    monkeypatch.delenv("COLUMNS")
    text = cli("show", "wide", "--runs", wide).out
    assert "No room" not in text
    assert "123.5 M" in text


def test_all_studies(cli: Cli, finished: Path) -> None:
    result = cli("show", "--runs", finished)
    assert result.status == 0
    assert re.search(r"^toys +toy_loss, toy_weights +\d+ +4 +Toys that count", result.out, re.M)
    (summary,) = cli("show", "--runs", finished, "--json").json
    assert summary["name"] == "toys"
    assert summary["outcomes"]["complete"] == 4


def test_an_empty_folder_says_how_to_start(cli: Cli, tmp_path: Path) -> None:
    result = cli("show", "--runs", tmp_path)
    assert result.status == 0
    assert "workbench run studies/quickstart.toml" in result.out
    assert cli("show", "--runs", tmp_path, "--json").json == []
    assert cli("show", "--runs", tmp_path / "not there", "--json").json == []


def test_the_runs_folder_comes_from_the_environment(
    cli: Cli, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKBENCH_RUNS", str(finished))
    assert cli("show", "--json").json[0]["name"] == "toys"


def test_a_front_holds_what_the_records_hold(cli: Cli, finished: Path) -> None:
    study = load_study("toys", finished)
    front = [trial.number for trial in study.front_trials()]
    data = cli("show", "toys", "--runs", finished, "--json").json
    assert data["front"] == front
    assert [record["number"] for record in data["records"]] == front
    data = cli("show", "toys", "--all", "--runs", finished, "--json").json
    assert len(data["records"]) == len(study.trials())
    text = cli("show", "toys", "--runs", finished).out
    assert re.findall(r"^ +(\d+)  ", text, flags=re.M) == [str(number) for number in front]


def test_what_to_look_at_next_can_be_opened(
    cli: Cli, wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load_study("wide", wide)
    refused = study.path / "trials" / "00000" / "trial.json"
    refused.write_text(json.dumps({"outcome": "infeasible", "reason": "too large"}))
    best = study.front_trials()[0].name
    assert best != "wide:0"
    for arguments in (["wide"], ["wide", "--all"]):
        assert f"Next: workbench show {best}\n" in cli("show", *arguments, "--runs", wide).out


def test_one_trial(cli: Cli, finished: Path) -> None:
    trial = load_study("toys", finished).front_trials()[0]
    text = cli("show", trial.name, "--runs", finished).out
    assert f"Trial {trial.name}: complete" in text
    assert re.search(r"^toy_loss +\d\.\d{3} +bits/byte +minimize$", text, flags=re.M)
    assert "torch" in text
    data = cli("show", trial.name, "--runs", finished, "--json").json
    assert data["metrics"] == trial.metrics
    assert data["layout"] == trial.layout.to_dict()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("toy", "unknown study 'toy'. Did you mean 'toys'? Known: toys. Looked in "),
        ("toy:1", "unknown study 'toy'. Did you mean 'toys'?"),
        ("toys:99", "study 'toys' has no trial 99: known are 0 to "),
        ("toys:x", "'toys:x' names no trial: write STUDY:NUMBER"),
        ("toys:", "names no trial"),
        ("toys:-1", "names no trial"),
    ],
)
def test_names_that_nothing_has(cli: Cli, finished: Path, name: str, words: str) -> None:
    assert words in cli("show", name, "--runs", finished).refused()


DAMAGE = {
    "cut off": '{"outcome": "compl',
    "empty": "",
    "no object": "[1, 2]",
    "no outcome": '{"number": 0}',
    "strange outcome": '{"outcome": "splendid"}',
    "metrics no object": '{"outcome": "complete", "metrics": 3}',
    "metrics lacking": '{"outcome": "complete", "metrics": {}}',
    "not text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_trial_hides_no_other(
    cli: Cli, finished: Path, tmp_path: Path, damage: str | bytes
) -> None:
    runs = shutil.copytree(finished, tmp_path / "runs")
    path = runs / "toys" / "trials" / "00000" / "trial.json"
    path.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    front = cli("show", "toys", "--runs", runs)
    assert front.status == 0
    assert "1 damaged" in front.out
    data = cli("show", "toys", "--all", "--runs", runs, "--json").json
    assert len(data["records"]) == len(load_study("toys", finished).trials())
    assert data["records"][0]["outcome"] == "damaged"
    assert str(path) in data["records"][0]["reason"]
    assert cli("show", "--runs", runs, "--json").json[0]["outcomes"]["complete"] == 3
    if "metrics lacking" not in DAMAGE or damage != DAMAGE["metrics lacking"]:
        assert str(path) in cli("show", "toys:0", "--runs", runs).refused()


@pytest.mark.parametrize(
    "damage", ['{"name": "toys"', "[]", "{}", '{"name": "toys"}', '{"name": "toys", "units": 3}']
)
def test_a_damaged_study_hides_no_other(
    cli: Cli, finished: Path, tmp_path: Path, damage: str
) -> None:
    runs = shutil.copytree(finished, tmp_path / "runs")
    other = shutil.copytree(runs / "toys", runs / "other")
    (other / "study.json").write_text(damage)
    listing = cli("show", "--runs", runs)
    assert listing.status == 0
    assert "toys" in listing.out
    assert f"warning: {other / 'study.json'}" in listing.err
    assert [study["name"] for study in cli("show", "--runs", runs, "--json").json] == ["toys"]
    assert str(other / "study.json") in cli("show", "other", "--runs", runs).refused()
    assert "Did you mean 'toys'" in cli("show", "toyz", "--runs", runs).refused()


def test_what_else_lies_in_the_folders_is_left_alone(
    cli: Cli, finished: Path, tmp_path: Path
) -> None:
    runs = shutil.copytree(finished, tmp_path / "runs")
    trials = runs / "toys" / "trials"
    shutil.copytree(trials / "00000", trials / "00000 copy")
    (trials / ".DS_Store").write_text("")
    (trials / "00099").mkdir()
    (runs / "notes.txt").write_text("")
    known = len(load_study("toys", finished).trials())
    assert cli("show", "--runs", runs, "--json").json[0]["trials"] == known
