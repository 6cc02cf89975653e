"""What the process that serves the dashboard is told."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from workbench.cli.app import app


class Server:
    """Stands for the server's process."""

    environment: dict[str, str]

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        Server.environment = env

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def wait(self, timeout: float | None = None) -> int:
        return 0


def test_a_server_of_records_is_told_no_password(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", Server)
    monkeypatch.setenv("PGPASSWORD", "geheim")
    monkeypatch.setenv("WORKBENCH_STORAGE", "postgresql://me:geheim@host/db")
    done: Any = CliRunner().invoke(app, ["dashboard", "--headless"])
    assert done.exit_code == 0, done.output
    assert Server.environment["WORKBENCH_RUNS"] == str(runs)
    assert not any("geheim" in value for value in Server.environment.values())
