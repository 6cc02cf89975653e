"""What the subcommands share: options, tables, figures for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from workbench.builder import Builder

Runs = Annotated[
    Path | None,
    typer.Option("--runs", help="Folder of all studies; WORKBENCH_RUNS, else ./runs."),
]
PluginDirs = Annotated[
    list[Path] | None,
    typer.Option("--plugin-dir", help="Folder whose .py files are plugins too; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]


def console(*, stderr: bool = False) -> Console:
    """A rich console; tables keep their columns when the output is a file."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False, soft_wrap=not sys.stdout.isatty())
    if not made.is_terminal:
        made.width = 160
    return made


def builder(plugin_dirs: Iterable[Path] | None) -> Builder:
    """The builder with the installed plugins and those of the folders given."""
    from workbench.builder import default_builder

    return default_builder(tuple(str(folder.resolve()) for folder in plugin_dirs or ()))


def print_json(data: Any) -> None:
    """Machine-readable output, alone on standard output."""
    json.dump(data, sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A rich table; figures are given as text and set flush right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    texts = [[str(value) for value in row] for row in rows]
    for index, name in enumerate(columns):
        numeric = bool(texts) and all(row[index][:1] in "0123456789-−" for row in texts)
        made.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in texts:
        made.add_row(*row)
    return made


def figure(value: float | None, unit: str = "") -> str:
    """A figure for people: bytes and counts scaled, others to four digits."""
    if value is None:
        return "–"
    if unit == "bytes":
        return scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))
    if unit in ("parameters", "FLOPs"):
        return scaled(value, 1000, ("", "k", "M", "G", "T", "P"))
    return f"{value:,.4g}"


def scaled(value: float, base: int, suffixes: Sequence[str]) -> str:
    """A figure with a unit prefix, to four digits; below the first prefix exact."""
    power = 0
    while abs(value) >= base and power + 1 < len(suffixes):
        value, power = value / base, power + 1
    text = f"{value:,.0f}" if power == 0 else f"{value:.4g}"
    return f"{text} {suffixes[power]}".strip()
