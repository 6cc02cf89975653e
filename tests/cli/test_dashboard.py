"""`workbench dashboard`: what it starts; the pages have tests of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli


class Server:
    """Stands for the process of the server."""

    started: list[tuple[list[str], dict[str, str]]]
    status = 0

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.started.append((command, env))

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def wait(self, timeout: float | None = None) -> int:
        return self.status


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(Server, "started", [], raising=False)
    monkeypatch.setattr(subprocess, "Popen", Server)
    return Server


def test_the_pages_are_served_with_the_runs_and_the_study(
    cli: Cli, server: Any, finished: Path
) -> None:
    options = ("--port", "8700", "--host", "0.0.0.0", "--headless", "--runs", finished)
    assert cli("dashboard", "toys", *options).status == 0
    ((command, environment),) = server.started
    assert command[:4] == [sys.executable, "-m", "streamlit", "run"]
    assert Path(command[4]).is_file()
    assert {"--server.port=8700", "--server.address=0.0.0.0", "--server.headless=true"} < set(
        command
    )
    assert environment["WORKBENCH_RUNS"] == str(finished)
    assert environment["WORKBENCH_STUDY"] == "toys"


def test_a_server_that_fails_is_not_hidden(
    cli: Cli, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "status", 3)
    assert cli("dashboard").status == 3


def test_an_unknown_study_starts_nothing(cli: Cli, server: Any, finished: Path) -> None:
    assert "Did you mean 'toys'?" in cli("dashboard", "toy", "--runs", finished).refused()
    assert server.started == []
