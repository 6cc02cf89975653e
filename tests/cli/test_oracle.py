"""`workbench oracle`: what it says before, while and after it judges a whole space."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from workbench.records import load_study


@pytest.fixture
def small(toy_study: Path) -> Path:
    """A study of ten layouts."""
    text = toy_study.read_text().replace("d_model = [8, 12, 16]", "d_model = 8")
    text += "\n[space.layers.toy]\nwidth = [1, 2]\n"
    toy_study.write_text(text)
    return toy_study


def test_it_asks_tabulates_and_reports(cli: Cli, small: Path, tmp_path: Path) -> None:
    runs = tmp_path / "some runs"
    cli("run", small, "--runs", runs, "--trials", "3")
    before = cli("oracle", "toys", "--runs", runs).refused()
    assert "7 of 10 layouts of study 'toys' are not judged yet" in before
    assert f"workbench oracle toys --tabulate --runs '{runs}'" in before
    done = cli("oracle", "toys", "--tabulate", "--runs", runs)
    assert done.status == 0
    assert "Study toys/oracle: resuming, 3 of 10 trials are done." in done.err
    assert "Space of toys: 10 layouts (10 complete)" in done.out
    assert "The search judged 3 trials, for 3.0 whole trainings." in done.out
    again = cli("oracle", "toys", "--runs", runs)
    assert again.out == done.out
    assert again.err == ""
    shown = cli("show", "toys/oracle", "--runs", runs)
    assert "Study toys/oracle: 10 complete" in shown.out


def test_json_has_the_regret_after_each_evaluation(cli: Cli, small: Path) -> None:
    cli("run", small, "--trials", "4")
    result = cli("oracle", "toys", "--tabulate", "--json").json
    assert (result["study"], result["layouts"]) == ("toys", 10)
    assert result["outcomes"] == {"complete": 10}
    assert result["combinations"] == 10 + result["duplicates"]
    regrets = [evaluation["regret"] for evaluation in result["evaluations"]]
    assert len(regrets) == 4
    assert regrets == sorted(regrets, reverse=True)
    milestones = {row["share"]: row for row in result["milestones"]}
    assert list(milestones) == [0.1, 0.25, 0.5, 1.0]
    assert milestones[1.0]["regret"] == regrets[-1]
    assert milestones[0.5]["evaluations"] == 2
    assert (regrets[-1] == 0) == (result["missed"] == [])
    assert set(result["missed"]) <= set(result["front"])


def test_what_is_missed_is_listed(cli: Cli, small: Path) -> None:
    cli("run", small, "--trials", "1")
    cli("oracle", "toys", "--tabulate")
    result = cli("oracle", "toys", "--json").json
    assert result["missed"]
    out = cli("oracle", "toys").out
    truth = {trial.name: trial for trial in load_study("toys/oracle").trials()}
    missed, front = (
        {
            tuple(truth[name].metrics[metric] for metric in ("toy_loss", "toy_weights"))
            for name in names
        }
        for names in (result["missed"], result["front"])
    )
    assert len(front) < len(result["front"])  # `toy` and `other` differ by their names alone
    assert f"Missed {len(missed)} of {len(front)} points of the true front" in out


def test_a_study_is_named_by_its_folder_too(
    cli: Cli, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli("run", small, "--runs", tmp_path / "far", "--trials", "3")
    monkeypatch.chdir(small.parent)
    folder = (tmp_path / "far" / "toys").rename(tmp_path / "far" / "renamed")
    before = cli("oracle", folder).refused()
    assert "7 of 10 layouts of study 'toys' are not judged yet" in before
    assert f"workbench oracle {folder} --tabulate takes over" in before
    assert cli("oracle", folder, "--tabulate").status == 0
    assert len(list((folder / "oracle" / "trials").iterdir())) == 10
    assert not Path("runs").exists()
    words = cli("oracle", folder / "oracle").refused()
    assert "toys/oracle is the whole space of toys: name the study itself" in words


def test_a_search_of_nothing_is_refused_before_any_training(cli: Cli, small: Path) -> None:
    cli("run", small, "--trials", "1")
    shutil.rmtree("runs/toys/trials")
    words = cli("oracle", "toys", "--tabulate").refused()
    assert "no trial of study 'toys' is judged yet" in words
    assert not Path("runs/toys/oracle").exists()


def test_refusals(cli: Cli, small: Path, toy_study: Path) -> None:
    assert "unknown study 'toys'" in cli("oracle", "toys").refused()
    cli("run", small, "--trials", "1")
    words = cli("oracle", "toys", "--limit", "9").refused()
    assert "the space has 10 layouts" in words
    assert "the limit is 9" in words
    assert "--limit" in cli("oracle", "toys", "--limit", "0").refused()
    assert not Path("runs/toys/oracle").exists()


def test_several_workers_judge_with_the_study_s_threads(cli: Cli, small: Path) -> None:
    text = small.read_text().replace('"inline"', '"process"').replace("threads = 1", "")
    small.write_text(text)
    cli("run", small, "--trials", "1")
    done = cli("oracle", "toys", "--tabulate", "--workers", "2")
    assert done.status == 0, done.err
    assert "10 complete" in done.out
