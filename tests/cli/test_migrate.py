"""`workbench migrate`: an old study's trials in a new one, and what is refused."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Cli
from workbench.records import load_study

GROWN = (('name = "toys"', 'name = "grown"'), ("[8, 12, 16]", "[8, 12, 16, 20]"))


def grown(toy_study: Path, *more: tuple[str, str]) -> Path:
    text = toy_study.read_text()
    for old, new in (*GROWN, *more):
        assert old in text
        text = text.replace(old, new)
    path = toy_study.with_name("grown.toml")
    path.write_text(text)
    return path


def test_migrate_tells_and_the_study_goes_on(cli: Cli, toy_study: Path, tmp_path: Path) -> None:
    runs = tmp_path / "some runs"
    cli("run", toy_study, "--runs", runs, "--trials", "2")
    new = grown(toy_study)
    done = cli("migrate", "toys", new, "--runs", runs)
    assert done.status == 0
    copied = len(load_study("grown", runs).trials())
    assert f"{copied} trials of toys copied to {runs}/grown/." in done.out
    assert f"  workbench run {new} --runs '{runs}'" in done.out
    again = cli("migrate", "toys", new, "--runs", runs)
    assert again.status == 2
    assert "there is a study 'grown'" in again.err
    more = cli("run", new, "--runs", runs, "--trials", "3")
    assert "Study grown: resuming, 2 of 3 trials are done." in more.err


def test_what_to_do_next_can_be_typed(cli: Cli, toy_study: Path, tmp_path: Path) -> None:
    """With the folders of plugins and the storage, but not its password."""
    cli("run", toy_study, "--trials", "1")
    new = grown(toy_study).rename(tmp_path / "grown study.toml")
    folder = tmp_path / "more plugins"
    folder.mkdir()
    url = f"sqlite:///{tmp_path}/shared.db"
    done = cli("migrate", "toys", new, "--storage", url, "--plugin-dir", folder)
    assert done.status == 0, done.err
    assert f"  workbench run '{new}' --plugin-dir '{folder}' --storage URL\n" in done.out


def test_json_says_which_became_which(cli: Cli, toy_study: Path) -> None:
    cli("run", toy_study, "--trials", "2")
    result = cli("migrate", "toys", grown(toy_study), "--json")
    assert result.json["migrated"]["0"] == 0
    assert result.json["left_out"] == {}
    assert result.json["name"] == "grown"


def test_what_would_not_compare_is_refused(cli: Cli, toy_study: Path) -> None:
    cli("run", toy_study, "--trials", "1")
    result = cli("migrate", "toys", grown(toy_study, ("lr = 0.01", "lr = 0.02")))
    assert result.status == 2
    assert "training" in result.err
    assert not Path("runs/grown").exists()


def test_run_takes_a_storage_and_shows_no_password(cli: Cli, toy_study: Path) -> None:
    url = f"sqlite:///{Path.cwd()}/shared.db"
    assert cli("run", toy_study, "--trials", "1", "--storage", url).status == 0
    assert Path("shared.db").exists()
    assert load_study("toys", "runs").data["storage"] == url
    without = cli("run", toy_study, "--trials", "2")
    assert without.status == 2
    assert f"keeps its trials in {url}" in without.err
    for wrong in ("postgresql://me:s3cret@localhost:1/db", "mysql://me:s3cret@host/db"):
        result = cli("run", toy_study, "--trials", "2", "--storage", wrong)
        assert result.status == 2
        assert "s3cret" not in result.out + result.err
