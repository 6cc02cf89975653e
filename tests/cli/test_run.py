"""`workbench run`: run, resume, extend, and refuse what cannot work before any of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.conftest import TEXT_STUDY, Cli
from workbench.records import load_study


def test_run_tells_shows_and_resumes(cli: Cli, toy_study: Path, tmp_path: Path) -> None:
    runs = tmp_path / "some runs"
    first = cli("run", toy_study, "--runs", runs, "--trials", "2")
    assert first.status == 0
    assert "Study toys: starting, 2 trials to judge." in first.err
    assert not set("\x1b\r") & set(first.err)  # a file takes no progress bars
    assert "Objectives: toy_loss ↓, toy_weights ↓" in first.err
    assert re.search(r"^trial   0  complete    \d\.\d+ bits/byte  .* s$", first.err, flags=re.M)
    assert "Pareto front: " in first.out
    assert f"Records: {runs}/toys/" in first.out
    best = load_study("toys", runs).front_trials()[0].name
    assert f"workbench show {best} --runs '{runs}'" in first.out
    assert "workbench generate" not in first.out  # the toy data holds no text

    again = cli("run", toy_study, "--runs", runs, "--trials", "2")
    assert again.status == 0
    assert "its goal of 2 trials is reached" in again.err
    assert again.out == first.out

    more = cli("run", toy_study, "--runs", runs)
    assert "Study toys: resuming, 2 of 4 trials are done." in more.err
    outcomes = [trial.outcome for trial in load_study("toys", runs).trials()]
    assert outcomes.count("complete") == 4


def test_workers_and_rungs_from_the_command_line(cli: Cli, toy_study: Path) -> None:
    text = (
        toy_study.read_text().replace('"inline"', '"process"').replace("trials = 4", "trials = 6")
    )
    toy_study.write_text(text + "\n[rungs]\nat = [0.5]\n")
    result = cli("run", toy_study, "--workers", "1")
    assert result.status == 0, result.err
    study = load_study("toys")
    assert study.data["config"]["runtime"]["workers"] == 1
    outcomes = study.summary()["outcomes"]
    assert outcomes["complete"] + outcomes["stopped"] == 6
    assert re.search(
        r"^trial +\d+  stopped     trial \d+ dominated it at step 4 \(50%", result.err, flags=re.M
    )
    assert f"{outcomes['stopped']} stopped" in result.out

    stopped = next(trial for trial in study.trials() if trial.outcome == "stopped")
    shown = cli("show", stopped.name).out
    assert "(another trial dominated it at a rung; not trained to the end)" in shown
    assert re.search(r"^Rung at step 4 \(50%\): toy_loss \d\.\d+; stopped$", shown, flags=re.M)
    assert "take a complete trial" in cli("export", stopped.name, "somewhere").refused()

    funnel = cli("show", "toys", "--funnel").out
    row = rf"^rung 0\.5 +6 +{outcomes['complete']} +{outcomes['stopped']} stopped +\d"
    assert re.search(row, funnel, flags=re.M), funnel
    stages = cli("show", "toys", "--funnel", "--json").json["funnel"]
    assert [stage["name"] for stage in stages] == [
        "static", "measured", "rung 0.5", "trained", "quantized",
    ]  # fmt: skip
    assert stages[-1]["passed"] == outcomes["complete"]
    assert "workbench show STUDY --funnel" in cli("show", stopped.name, "--funnel").refused()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--workers", "0"), "--workers: must be at least 1"),
        (("--workers", "2"), "runtime.workers: executor = 'inline' judges one trial at a time"),
        (("--address", "auto"), "--address: is of a Ray cluster"),
        (("--executor", "cloud"), "unknown executor 'cloud'"),
    ],
)
def test_executors_that_cannot_be_are_refused(
    cli: Cli, toy_study: Path, options: tuple[str, ...], words: str
) -> None:
    assert words in cli("run", toy_study, *options).refused()
    assert not Path("runs/toys").exists()


def test_a_mistake_in_an_option_is_not_said_to_be_in_the_file(cli: Cli, toy_study: Path) -> None:
    said = cli("run", toy_study, "--storage", "mysql://host/db").refused()
    assert "--storage" in said
    assert toy_study.name not in said
    assert not Path("runs/toys").exists()


def test_another_executor_needs_no_cluster(cli: Cli, toy_study: Path) -> None:
    """The study's own address is of the cluster, which is not asked then."""
    text = toy_study.read_text()
    assert 'executor = "inline"' in text
    toy_study.write_text(text.replace('executor = "inline"', 'executor = "ray"\naddress = "auto"'))
    assert cli("run", toy_study, "--executor", "inline", "--trials", "1").status == 0


def test_what_to_type_next_works(cli: Cli, notes: Path, tmp_path: Path) -> None:
    study = tmp_path / "notes.toml"
    text = notes.parent / "notes.txt"
    study.write_text(TEXT_STUDY.replace("{text}", str(text)))
    shown = cli("run", study, "--runs", notes).out.partition("Next:\n")[2]
    commands = re.findall(r"^  workbench (\w+) (\S+)", shown, flags=re.M)
    assert commands == [
        ("show", "notes:0"), ("dashboard", "notes"), ("generate", "notes:0"), ("export", "notes:0"),
    ]  # fmt: skip


def test_json_is_alone_on_standard_output(cli: Cli, toy_study: Path) -> None:
    result = cli("run", toy_study, "--json")
    assert result.json["outcomes"]["complete"] == 4
    study = load_study("toys", "runs")
    assert result.json["front"] == [trial.name for trial in study.front_trials()]
    assert "trial   0" in result.err


def test_options_override_the_file(cli: Cli, toy_study: Path, tmp_path: Path) -> None:
    text = toy_study.read_text().replace('device = "cpu"', 'device = "cuda:7"')
    toy_study.write_text(text)
    assert "cuda:7" in cli("run", toy_study).refused()
    assert cli("run", toy_study, "--device", "cpu", "--trials", "1").status == 0
    assert load_study("toys", "runs").data["config"]["runtime"]["executor"] == "inline"


CHANGES = {
    "unknown metric": ('"toy_loss", "toy_weights"', '"toy_los"', "Did you mean 'toy_loss'"),
    "unknown layer": ('["toy", "other"]', '["toy", "othr"]', "Did you mean 'other'"),
    "unknown placement": ('"alternate"', '"alternat"', "Did you mean 'alternate'"),
    "unknown data": ('"counting"', '"countin"', "Did you mean 'counting'"),
    "unknown table": ("[training]", "[trainin]", "Did you mean 'training'"),
    "unknown field": ("seq_len = 16", "seqlen = 16", "Did you mean 'seq_len'"),
    "wrong type": ("tokens = 512", 'tokens = "many"', "training.tokens: expected int"),
    "too few tokens": ("tokens = 512", "tokens = 5", "training.tokens: 5 are fewer than"),
    "no budget": ("[budget]\ntrials = 4\n", "", "budget: is required in a study file"),
    "no trials": ("trials = 4", "trials = 0", "budget.trials: must be at least 1"),
    "no space": ("d_model = [8, 12, 16]\n", "", "space.d_model: is required"),
    "bad name": ('name = "toys"', 'name = "../toys"', "name: '../toys'"),
    "not toml": ("[space]", "[space", "is not TOML"),
    "unknown device": ('device = "cpu"', 'device = "gpu"', "'gpu' is no device"),
    "unknown executor": ('"inline"', '"rays"', "unknown executor 'rays'. Did you mean 'ray'"),
    "no plugin folder": ("toy_plugins", "no_plugins", "no such folder"),
}


@pytest.mark.parametrize(("old", "new", "words"), CHANGES.values(), ids=CHANGES.keys())
def test_mistakes_in_the_file_are_refused_before_any_work(
    cli: Cli, toy_study: Path, old: str, new: str, words: str
) -> None:
    text = toy_study.read_text()
    assert old in text
    toy_study.write_text(text.replace(old, new))
    assert words in cli("run", toy_study).refused()
    assert not Path("runs/toys").exists()


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("toy.toml", "there is no study file toy.toml. Did you mean toys.toml? Known: toys.toml."),
        ("toys", "Did you mean toys.toml?"),
        ("elsewhere/x.toml", "there is no study file elsewhere/x.toml."),
        (".", "cannot read the study file"),
    ],
)
def test_a_missing_file(cli: Cli, toy_study: Path, file: str, words: str) -> None:
    assert words in cli("run", file).refused()


def test_only_studies_are_suggested(cli: Cli, toy_study: Path, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "mine"\n')
    (tmp_path / "broken.toml").write_text("[space")
    message = cli("run", "project.toml").refused()
    assert message.endswith("there is no study file project.toml. Known: toys.toml.\n")


def test_a_name_that_nothing_has_is_told_with_field_and_file(cli: Cli, toy_study: Path) -> None:
    toy_study.write_text(toy_study.read_text().replace('"toy_depth"', '"toy_dept"'))
    message = cli("run", toy_study).refused()
    assert message.startswith(f"Error: {toy_study}: unknown metric in report 'toy_dept'.")
    assert "--device: 'gpu' is no device" in cli("run", toy_study, "--device", "gpu").refused()


def test_an_impossible_study_is_told_in_few_lines(cli: Cli, toy_study: Path) -> None:
    toy_study.write_text(toy_study.read_text() + "\n[constraints]\ntoy_weights = {max = 3}\n")
    result = cli("run", toy_study)
    assert result.status == 2
    assert len(result.err.splitlines()) < 10
    assert "… and 39 more like it" in result.err
    assert "Error: none of 40 suggestions is feasible." in result.err
    assert "[constraints] toy_weights, such as: toy_weights = " in result.err
    assert len(load_study("toys", "runs").trials()) == 40
    shown = cli("show", "toys", "--all").out
    assert "Next: workbench show toys:39 says why it is infeasible." in shown


@pytest.mark.parametrize("trials", ["0", "-3"])
def test_a_budget_of_nothing(cli: Cli, toy_study: Path, trials: str) -> None:
    assert "--trials: must be at least 1" in cli("run", toy_study, "--trials", trials).refused()


def test_a_changed_space_is_refused_and_loses_nothing(cli: Cli, toy_study: Path) -> None:
    assert cli("run", toy_study, "--trials", "1").status == 0
    before = cli("show", "toys", "--all", "--json").out
    toy_study.write_text(toy_study.read_text().replace("[8, 12, 16]", "[8, 12]"))
    message = cli("run", toy_study).refused()
    assert "was started differently" in message
    assert "space.d_model: [8, 12, 16] then, [8, 12] now" in message
    assert "another name" in message
    assert cli("show", "toys", "--all", "--json").out == before


def test_impossible_layouts_are_outcomes_with_the_field_named(cli: Cli, tmp_path: Path) -> None:
    study = tmp_path / "heads.toml"
    text = TEXT_STUDY.replace("{text}", str(study)).replace('"mamba", ', "")
    text = text.replace("num_heads = 2", "num_heads = [2, 3, 4, 5, 7, 8]")
    study.write_text(text.replace("trials = 1", "trials = 3"))
    assert cli("run", study).status == 0
    trials = load_study("notes", "runs").trials()
    reasons = [trial.reason for trial in trials if trial.outcome == "infeasible"]
    assert reasons
    for reason in reasons:
        assert re.search(r"\(attention\)\.num_heads: \d does not divide d_model = 16", reason)


@pytest.mark.parametrize("damage", ["", "[]", '{"name": "toys"'])
def test_a_damaged_study_is_not_resumed_over(cli: Cli, toy_study: Path, damage: str) -> None:
    assert cli("run", toy_study, "--trials", "1").status == 0
    record = Path("runs/toys/study.json")
    record.write_text(damage)
    assert str(record) in cli("run", toy_study).refused()
    assert record.read_text() == damage


def test_a_damaged_trial_does_not_stop_a_study(cli: Cli, toy_study: Path) -> None:
    assert cli("run", toy_study, "--trials", "2").status == 0
    Path("runs/toys/trials/00000/trial.json").write_text("{")
    assert cli("run", toy_study, "--trials", "3").status == 0
    outcomes = [trial.outcome for trial in load_study("toys", "runs").trials()]
    assert outcomes[0] == "damaged"
    assert outcomes.count("complete") >= 3


def test_folders_that_cannot_be_made(cli: Cli, toy_study: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = cli("run", toy_study, "--runs", tmp_path / "file" / "runs").refused()
    assert "cannot make the folder" in message
