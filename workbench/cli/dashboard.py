"""`workbench dashboard`: browse studies in a browser."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from workbench.cli import interrupts
from workbench.cli.common import Runs

EXAMPLES = """\
  workbench dashboard
  workbench dashboard quickstart --port 8502 --headless"""

GRACE = 5.0  # seconds for the server to say goodbye by itself


def dashboard(
    study: Annotated[
        str | None, typer.Argument(metavar="STUDY", help="Study to open with.")
    ] = None,
    port: Annotated[
        int, typer.Option(metavar="PORT", min=1, max=65535, help="To serve on.")
    ] = 8501,
    host: Annotated[str, typer.Option(metavar="HOST", help="Address to serve on.")] = "localhost",
    headless: Annotated[bool, typer.Option("--headless", help="Open no browser.")] = False,
    runs: Runs = None,
) -> None:
    """Browse studies in a browser, until Ctrl-C."""
    import subprocess

    from workbench.records import load_study, runs_folder
    from workbench.storage_url import public_environment

    environment = {**public_environment(), "WORKBENCH_RUNS": str(runs_folder(runs).resolve())}
    if study is not None:
        environment["WORKBENCH_STUDY"] = load_study(study, runs).name
    page = Path(__file__).parents[1] / "dashboard" / "app.py"
    command = [sys.executable, "-m", "streamlit", "run", str(page)]
    command += [f"--server.port={port}", f"--server.address={host}"]
    command += [f"--server.headless={str(headless).lower()}", "--browser.gatherUsageStats=false"]
    command += ["--client.toolbarMode=viewer", "--server.fileWatcherType=none"]
    with interrupts.ignored():  # by the server too, until it can end in order
        server = subprocess.Popen(command, env=environment)
    with server, interrupts.raised():
        try:
            status = server.wait()
        except KeyboardInterrupt:  # how a dashboard is meant to end
            server.terminate()
            try:
                server.wait(GRACE)
            except subprocess.TimeoutExpired:
                server.kill()
            return
    if status != 0:
        raise typer.Exit(status)
