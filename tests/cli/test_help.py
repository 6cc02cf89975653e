"""Help, names and exit statuses: what a new user meets first."""

from __future__ import annotations

import re
import shlex

import pytest
import typer

from tests.cli.conftest import Cli
from workbench import __version__
from workbench.cli.app import COMMANDS, app

NAMES = [module.__name__.rpartition(".")[2].replace("_", "-") for module in COMMANDS]
ISSUE = [
    "run", "show", "confirm", "audit", "migrate", "oracle", "describe", "measure", "latency",
    "scale", "train", "export", "generate", "plugins", "new-plugin", "check-plugin",
    "doctor", "dashboard",
]  # fmt: skip


def examples(name: str) -> list[list[str]]:
    """The arguments of the example commands of one command, without comments."""
    module = COMMANDS[NAMES.index(name)]
    lines = module.EXAMPLES.replace("\\\n", " ").splitlines()
    commands = [re.split(r" {3,}(?!-)", line.strip())[0] for line in lines]
    return [shlex.split(command.partition("workbench ")[2]) for command in commands]


def test_every_command_is_there(cli: Cli) -> None:
    assert NAMES == ISSUE
    result = cli("--help")
    assert result.status == 0
    listed = re.findall(r"^  ([a-z][a-z-]+)  +[A-Z]", result.out, flags=re.M)
    assert listed == ISSUE


@pytest.mark.parametrize("columns", ["80", "120"])
def test_help_fits_and_its_summaries_are_whole(
    cli: Cli, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = cli("--help").out
    assert "..." not in text.partition("Commands:")[2]
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("name", ISSUE)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_has_an_example(
    cli: Cli, name: str, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = cli(name, flag)
    assert result.status == 0
    assert result.err == ""
    shown = result.out.partition("Examples:\n")[2]
    assert f"workbench {name}" in shown
    assert max(map(len, result.out.splitlines())) <= 80
    # Every argument and option is explained.
    for line in result.out.splitlines():
        assert not re.fullmatch(r"  (-\S+|[A-Z]+)( \S+)?", line), line


@pytest.mark.parametrize("name", ISSUE)
def test_examples_name_options_that_exist(name: str) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    for arguments in examples(name):
        assert arguments[0] == name
        context = command.make_context(name, arguments[1:])
        assert context.args == []


def test_no_command_shows_help(cli: Cli) -> None:
    result = cli()
    assert result.status == 2
    assert "Commands:" in result.out + result.err


def test_version(cli: Cli) -> None:
    assert cli("--version").out == f"{__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["descrbe"], "unknown command 'descrbe'. Did you mean 'describe'? Known: audit, "),
        (["show", "--al"], "No such option: --al"),
        (["describe"], "Missing argument 'LAYOUT'"),
        (["generate", "a:1"], "Missing option '--prompt'"),
        (["measure", "mamba-130m", "--context", "many"], "Invalid value for '--context'"),
        (["plugins", "extra"], "unexpected extra argument"),
        (["dashboard", "--port", "0"], "Invalid value for '--port'"),
        (["--colour"], "No such option: --colour"),
    ],
)
def test_mistakes_in_the_command_itself(cli: Cli, arguments: list[str], words: str) -> None:
    assert words in cli(*arguments).refused()


def test_a_fault_of_ours_is_owned_and_shown_on_request(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr("workbench.cli.show.read_studies", broken)
    result = cli("show")
    assert result.status == 1
    assert "Unexpected ZeroDivisionError: planted" in result.err
    assert "Traceback" not in result.err
    monkeypatch.setenv("WORKBENCH_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli("show")
