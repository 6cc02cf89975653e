"""What commands import: nothing heavy before it is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "torch", "optuna", "pandas", "numpy", "streamlit", "transformers", "plotly", "sqlalchemy",
    "rich", "pydantic",
}  # fmt: skip
CODE = f"""
import sys
from workbench.cli.app import run_app
status = run_app(sys.argv[1:])
print(status, *sorted({HEAVY} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["run", "--help"],
        ["show"],
        ["show", "--json"],
        ["show", "toys"],
        ["show", "toys", "--all"],
        ["show", "toys:0"],
    ],
    ids=" ".join,
)
def test_help_and_listings_import_nothing_heavy(arguments: list[str], finished: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments],
        env={"WORKBENCH_RUNS": str(finished)},
        capture_output=True,
        text=True,
        check=True,
    )
    status, *imported = done.stderr.split()
    assert status == "0"
    assert imported == []
    assert done.stdout
