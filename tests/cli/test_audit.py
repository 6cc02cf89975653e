"""`workbench audit`: a table that fits, the flips, and JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Cli


@pytest.mark.parametrize("columns", ["80", "120"])
def test_audit_shows_agreement_and_flips(
    cli: Cli, finished: Path, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    data = cli("audit", "toys", "--runs", finished, "--json", "--flips", "2").json
    result = cli("audit", "toys", "--runs", finished, "--flips", "2")
    assert result.status == 0
    assert max(map(len, result.out.splitlines())) <= int(columns)
    for row in data["agreements"]:
        assert row["signal"] in result.out
        if row["tau"] is not None:
            assert f"{row['tau']:+.2f}" in result.out
        assert len(row["flips"]) == min(2, row["flipped"])
    assert {row["objective"] for row in data["agreements"]} == {"toy_loss"}
    assert "Selection bias" not in result.out
    none = cli("audit", "toys", "--runs", finished, "--flips", "0")
    assert "flips of" not in none.out


def test_audit_says_what_rungs_took_away(cli: Cli, finished: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(finished, runs)
    path = runs / "toys" / "trials" / "00099" / "trial.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"outcome": "stopped"}))
    assert "Selection bias: 1 trial that rungs stopped" in cli("audit", "toys").out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--flips", "-1"], "--flips: must not be negative"),
        (["--resamples", "10"], "--resamples: must be at least 1,000"),
        (["--seed", "-1"], "--seed: must not be negative"),
    ],
)
def test_mistakes(cli: Cli, finished: Path, arguments: list[str], words: str) -> None:
    assert words in cli("audit", "toys", *arguments, "--runs", finished).refused()
