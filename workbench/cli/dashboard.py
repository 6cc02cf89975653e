"""`workbench dashboard`: browse studies in a browser."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from workbench.cli.common import Runs

EXAMPLE = "Example: workbench dashboard quickstart --port 8502"


def dashboard(
    study: Annotated[str | None, typer.Argument(help="Study to open with.")] = None,
    port: Annotated[int, typer.Option(help="Port to serve on.")] = 8501,
    host: Annotated[str, typer.Option(help="Address to serve on.")] = "localhost",
    headless: Annotated[bool, typer.Option("--headless", help="Open no browser.")] = False,
    runs: Runs = None,
) -> None:
    """Serve the dashboard until Ctrl-C: studies, Pareto fronts, trials, export."""
    from workbench.records import load_study, runs_folder

    environment = {**os.environ, "WORKBENCH_RUNS": str(runs_folder(runs).resolve())}
    if study is not None:
        environment["WORKBENCH_STUDY"] = load_study(study, runs).name
    page = Path(__file__).parents[1] / "dashboard" / "app.py"
    command = [sys.executable, "-m", "streamlit", "run", str(page)]
    command += [f"--server.port={port}", f"--server.address={host}"]
    command += [f"--server.headless={str(headless).lower()}", "--browser.gatherUsageStats=false"]
    status = subprocess.run(command, env=environment, check=False).returncode
    if status not in (0, 130):
        raise typer.Exit(status)
