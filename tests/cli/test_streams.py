"""Standard output and error: closed pipes, narrow encodings, folders that cannot be written."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import COMMAND, process


@pytest.mark.parametrize("arguments", [["show", "toys", "--all", "--json"], ["--help"], ["show"]])
def test_a_reader_that_goes_away(arguments: list[str], finished: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [COMMAND, *arguments],
            env={**os.environ, "WORKBENCH_RUNS": str(finished)},
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writer)
    assert done.returncode == 1
    assert done.stderr == ""


def test_head_reads_the_beginning(finished: Path) -> None:
    done = subprocess.run(
        f"'{COMMAND}' show toys --all --json --runs '{finished}' | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("{\n", "")


def test_a_terminal_without_unicode(finished: Path) -> None:
    done = process("show", "toys", "--runs", finished, PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "toy_loss ?" in done.stdout
    assert done.stderr == ""


def test_a_piped_table_has_no_limit_and_no_trailing_spaces(finished: Path) -> None:
    done = process("show", "toys", "--runs", finished, TERM="xterm-256color")
    assert "\x1b" not in done.stdout
    assert "No room" not in done.stdout
    assert all(line == line.rstrip() for line in done.stdout.splitlines())
