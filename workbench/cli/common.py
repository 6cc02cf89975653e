"""What the subcommands share: options, and how they print."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.figures import figure
from workbench.stray_output import results
from workbench.text_table import Column, table

if TYPE_CHECKING:
    from rich.console import Console

    from workbench.builder import Builder
    from workbench.study_config import StudyConfig

__all__ = ["Column", "figure"]

SILENCE = 30.0  # seconds of work after which a file or pipe is told how far it is

Runs = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Folder of all studies; WORKBENCH_RUNS, else ./runs."),
]
PluginDirs = Annotated[
    list[Path] | None,
    typer.Option(metavar="FOLDER", help="Folder whose .py files are plugins too; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")]
Source = Annotated[str, typer.Argument(metavar="LAYOUT", help="JSON file, STUDY:TRIAL or preset.")]
TrialName = Annotated[str, typer.Argument(metavar="STUDY:TRIAL", help="Such as quickstart:7.")]


@contextmanager
def as_options() -> Iterator[None]:
    """Inside, an error in a field names the option that set it."""
    from workbench.errors import FieldError

    try:
        yield
    except FieldError as error:
        raise FieldError(f"--{error.field.replace('_', '-')}", error.message) from None


def builder(plugin_dirs: Iterable[Path] | None) -> Builder:
    """The builder with the installed plugins and those of the folders given."""
    from workbench.builder import default_builder

    return default_builder(tuple(str(folder.resolve()) for folder in plugin_dirs or ()))


def log() -> Console:
    """Standard error as a rich console: what is no result goes there."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def warn(message: str) -> None:
    """A line on standard error."""
    print(f"warning: {message}", file=sys.stderr)


def line_width() -> int | None:
    """Characters of a line of standard output; None for a file or a pipe, which have no limit."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS"):
        return shutil.get_terminal_size().columns
    return None


def say(text: str) -> None:
    """Print prose, wrapped between words where lines have a width."""
    width = line_width()
    for line in text.splitlines():
        wrapped = width and textwrap.wrap(
            line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        print("\n".join(wrapped) if wrapped else line)


def print_json(data: Any) -> None:
    """Machine-readable output, alone on standard output."""
    stream = results()
    json.dump(data, stream, indent=2, allow_nan=False)
    stream.write("\n")
    stream.flush()


def print_table(columns: Sequence[Column], more: str = "--json") -> None:
    """Print a table, what it had no room for, and a blank line.

    Args:
        more: where the columns that were left out are to be had.
    """
    made = table(columns, line_width())
    print(made)
    if made.left_out:
        say(f"No room for {', '.join(made.left_out)}: widen the terminal, or see {more}.")
    print()


def prompt_of(config: StudyConfig) -> str:
    """A beginning that a model of the study's data may know: code or prose."""
    return "def main(" if config.data["source"] == "stdlib" else "The "


def count(number: int, noun: str) -> str:
    """`1 trial`, `2 trials`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
