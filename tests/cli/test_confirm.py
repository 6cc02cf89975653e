"""`workbench confirm`, and what `workbench show` makes of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from workbench.records import load_study


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "some runs"))


def test_confirm_tells_and_show_has_means_and_what_is_unresolved(
    cli: Cli, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = cli("show", "toys", "--runs", runs)
    assert "±" not in before.out
    assert "confirmed" not in cli("show", "toys", "--runs", runs, "--json").json
    done = cli("confirm", "toys", "--runs", runs)
    assert done.status == 0
    assert "complete" in done.err
    assert f"  workbench show toys --runs '{runs}'" in done.out
    points = load_study("toys", runs).confirmed()
    shown = cli("show", "toys", "--runs", runs)
    assert shown.out.count(" ± ") == len(points)
    for point in points:
        assert point.intervals["toy_loss"].text("bits/byte") in shown.out
    data = cli("show", "toys", "--runs", runs, "--json").json
    assert data["confirmed"] == [point.to_dict() for point in points]
    assert cli("confirm", "toys", "--runs", runs, "--json").json == data["confirmed"]
    unresolved = [point for point in points if point.unresolved]
    assert ("unresolved" in shown.out.split("±: 95 %")[0]) == bool(unresolved)
    monkeypatch.setenv("COLUMNS", "80")
    narrow = cli("show", "toys", "--runs", runs)
    assert max(map(len, narrow.out.splitlines())) <= 80
    assert narrow.out.count(" ± ") == len(points)


def test_only_named_trials_are_trained(cli: Cli, runs: Path) -> None:
    number = load_study("toys", runs).front_trials()[0].number
    result = cli(
        "confirm", "toys", "--trials", str(number), "--seeds", "2", "--runs", runs, "--json"
    )
    assert [point["trial"] for point in result.json] == [number]
    assert len(result.json[0]["objectives"]["toy_loss"]["values"]) == 2


def test_a_study_is_named_by_its_folder_too(cli: Cli, runs: Path) -> None:
    done = cli("confirm", runs / "toys", "--seeds", "2")
    assert f"  workbench show '{runs / 'toys'}'\n" in done.out
    assert cli("show", runs / "toys").status == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seeds", "1"], "--seeds: must be at least 2"),
        (["--trials", "3,x"], "--trials: expected numbers such as 3,7"),
        (["--trials", "999"], "has no trial 999"),
        (["--workers", "0"], "--workers: must be at least 1"),
        (["--address", "auto"], "--address: is of a Ray cluster"),
        (["--executor", "slurm"], "unknown executor 'slurm'"),
    ],
)
def test_mistakes(cli: Cli, runs: Path, arguments: list[str], words: str) -> None:
    assert words in cli("confirm", "toys", *arguments, "--runs", runs).refused()
