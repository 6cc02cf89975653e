"""The `workbench` command: one module a subcommand, each importing its heavy parts when it runs."""

from __future__ import annotations

import gc
import io
import os
import sys

from workbench.cli import interrupts


def main() -> None:
    """The console script. Ctrl-C ends it quietly even while Python still imports the rest."""
    interrupts.leave_at_once()
    # Imports leave no garbage, but looking for it among them takes a tenth of a second and more.
    gc.set_threshold(100_000, *gc.get_threshold()[1:])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without – and ─ gets question marks
    from workbench.cli.app import run_app

    status = run_app()
    if "WORLD_SIZE" in os.environ:
        from workbench.sharded_launch import leave

        leave(status)
    raise SystemExit(status)
