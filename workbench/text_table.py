"""Plain tables that fit a terminal: columns are folded or left out, figures are never cut."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Sequence
from typing import Literal

GAP = "  "
LEAST_TEXT = 20  # characters below which text is no longer read
ENOUGH = 40  # characters that text gets before headings get theirs
BREAK = "\v"  # where textwrap may break a line besides spaces: it takes this for one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """One column.

    Attributes:
        heading: may be broken after `_`, `/` and spaces.
        cells: a text a row.
        right: flush right, as figures are.
        fit: what becomes of cells for which there is no room: they stay `"whole"`, `"wrap"` over
            several lines, or are `"cut"` to one.
        rank: where there is no room, the column of the highest rank is left out first; 0 stays.
    """

    heading: str
    cells: Sequence[str]
    right: bool = False
    fit: Literal["whole", "wrap", "cut"] = "whole"
    rank: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table as text.

    Attributes:
        heading: lines of the heading, the last one a rule.
        rows: lines of each row.
        left_out: headings of the columns that there was no room for.
    """

    heading: list[str]
    rows: list[list[str]]
    left_out: list[str]

    @property
    def rule(self) -> str:
        """A line as wide as the table."""
        return self.heading[-1]

    def __str__(self) -> str:
        return "\n".join([*self.heading, *(line for row in self.rows for line in row)])


def table(columns: Sequence[Column], width: int | None = None) -> Table:
    """Lay out a table; columns without any text are not shown.

    Args:
        columns: all with the same number of cells.
        width: characters of a line; None for no limit. Exceeded only where the columns of rank 0
            alone do not fit.
    """
    shown = [column for column in columns if any(column.cells)]
    left_out: list[str] = []
    while (widths := _widths(shown, width)) is None:
        last = max(shown, key=lambda column: column.rank)
        if last.rank == 0:
            widths = [_narrow(column) for column in shown]
            break
        shown.remove(last)
        left_out.insert(0, last.heading)
    headings = [_break(column.heading, room) for column, room in zip(shown, widths, strict=True)]
    tallest = max(map(len, headings), default=0)
    headings = [[""] * (tallest - len(lines)) + lines for lines in headings]
    rows = [
        [_wrap(column, index, room) for column, room in zip(shown, widths, strict=True)]
        for index in range(len(columns[0].cells) if columns else 0)
    ]
    rule = "─" * (sum(widths) + len(GAP) * (len(widths) - 1))
    return Table(
        heading=[*_lines(headings, shown, widths), rule],
        rows=[_lines(row, shown, widths) for row in rows],
        left_out=left_out,
    )


def _widths(columns: Sequence[Column], width: int | None) -> list[int] | None:
    """A width a column, or None if there is no room for them all."""
    wanted = [max(len(c.heading), _longest(c.cells)) for c in columns]
    if width is None:
        return wanted
    spare = width - len(GAP) * (len(columns) - 1)
    widths = [_narrow(column) for column in columns]
    spare -= sum(widths)
    if spare < 0:
        return None
    # Text gets room first, then headings, then text gets what is left.
    texts = [index for index, column in enumerate(columns) if column.fit != "whole"]
    headings = [index for index, column in enumerate(columns) if column.fit == "whole"]
    for index, limit in [
        *((index, ENOUGH) for index in texts),
        *((index, wanted[index]) for index in headings),
        *((index, wanted[index]) for index in texts),
    ]:
        extra = max(0, min(spare, min(wanted[index], limit) - widths[index]))
        if columns[index].fit != "whole" or widths[index] + extra == wanted[index]:
            widths[index] += extra
            spare -= extra
    return widths


def _narrow(column: Column) -> int:
    """The least width: a heading of two lines, whole figures, and text still readable."""
    pieces = _pieces(column.heading)
    splits = range(1, len(pieces))
    heading = min(
        (max(len("".join(pieces[:i]).rstrip()), len("".join(pieces[i:]))) for i in splits),
        default=len(column.heading),
    )
    cells = _longest(column.cells)
    return max(heading, cells if column.fit == "whole" else min(cells, LEAST_TEXT))


def _longest(cells: Sequence[str]) -> int:
    return max(map(len, cells), default=0)


def _pieces(heading: str) -> list[str]:
    return re.findall(r"[^_/ ]*[_/ ]|[^_/ ]+", heading)


def _break(heading: str, width: int) -> list[str]:
    lines = [""]
    for piece in _pieces(heading):
        if lines[-1] and len((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def _wrap(column: Column, row: int, width: int) -> list[str]:
    cell = column.cells[row]
    if column.fit == "whole" or len(cell) <= width:
        return [cell]
    if column.fit == "cut":
        return [cell[: width - 1].rstrip() + "…"]
    breakable = cell.replace("/", f"/{BREAK}")
    lines = textwrap.wrap(breakable, width, break_on_hyphens=False, replace_whitespace=False)
    return [line.replace(BREAK, "") for line in lines]


def _lines(cells: list[list[str]], columns: Sequence[Column], widths: Sequence[int]) -> list[str]:
    """The lines of one row, side by side."""
    padded = [
        [line.rjust(width) if column.right else line.ljust(width) for line in cell]
        for cell, column, width in zip(cells, columns, widths, strict=True)
    ]
    blank = [" " * width for width in widths]
    height = max(map(len, padded), default=0)
    return [
        GAP.join(
            cell[index] if index < len(cell) else space
            for cell, space in zip(padded, blank, strict=True)
        ).rstrip()
        for index in range(height)
    ]
