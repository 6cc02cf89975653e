"""A Description as text and as HTML: runs of equal blocks folded, figures scaled for people."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from workbench import figures
from workbench.text_table import Column, table

if TYPE_CHECKING:
    from workbench.description import Description, Row

WIDTH = 100
HEADINGS = (
    "block", "×", "layer", "config", "stored as", "parameters",
    "FLOPs/token", "decode FLOPs", "weights", "state",
)  # fmt: skip
FIRST_FIGURE = HEADINGS.index("parameters")
# What a narrow terminal does without, the highest first.
RANKS = {"decode FLOPs": 3, "×": 2, "config": 1}


def fold(keys: Sequence[Hashable]) -> list[tuple[int, int, int]]:
    """Repeats in a sequence as (start, unit, count): `count` times the `unit` items at `start`.

    The shortest list of rows, long units costing a little more, for they are harder to read:
    `MMMMA-MMMMA-` is `4 × M, A, -, 4 × M, A, -`, and four of Jamba's periods are one unit.
    """
    groups: list[tuple[int, int, int]] = [(0, 0, 0)] * len(keys)
    least = [0.0] * (len(keys) + 1)
    for start in reversed(range(len(keys))):
        choices = []
        for unit in range(1, max(1, (len(keys) - start) // 2) + 1):
            count = _count_repeats(keys, start, unit)
            if unit == 1 or count > 1:
                rows = unit + (unit - 1) / 2 + least[start + unit * count]
                choices.append((rows, unit, count))
        least[start], unit, count = min(choices)
        groups[start] = (start, unit, count)
    path = []
    start = 0
    while start < len(keys):
        path.append(groups[start])
        start += groups[start][1] * groups[start][2]
    return path


def _count_repeats(keys: Sequence[Hashable], start: int, unit: int) -> int:
    first = keys[start : start + unit]
    count = 1
    while keys[start + count * unit : start + (count + 1) * unit] == first:
        count += 1
    return count


def short_pattern(pattern: str, width: int) -> str:
    """A pattern of at most `width` characters as it is, a longer one with its repeats counted.

    `M-M-M-M-M-A-` is `(M-)×5 A-` where it does not fit.
    """
    if len(pattern) <= width:
        return pattern
    parts: list[str] = []
    single = False
    for start, unit, count in fold(pattern):
        glyphs = pattern[start : start + unit]
        text = glyphs if count == 1 else f"{glyphs}×{count}" if unit == 1 else f"({glyphs})×{count}"
        if single and count == 1:
            parts[-1] += text
        else:
            parts.append(text)
        single = count == 1
    short = " ".join(parts)
    return short if len(short) < len(pattern) else pattern


def to_text(description: Description, width: int | None = None) -> str:
    """A plain table for terminals.

    Args:
        width: characters of a line, for which columns are folded or left out; None for no limit
            on the table's.
    """
    prose = min(width or WIDTH, WIDTH)
    columns = [
        Column(
            heading=heading,
            cells=cells,
            right=index >= FIRST_FIGURE,
            fit="wrap" if heading == "config" else "whole",
            rank=RANKS.get(heading, 0),
        )
        for index, (heading, cells) in enumerate(
            zip(HEADINGS, zip(*_body(description), strict=True), strict=True)
        )
    ]
    made = table(columns, width)
    *rows, total = made.rows
    lines = [
        *textwrap.wrap(_heading(description), width or 10**6),
        *textwrap.wrap(description.pattern, prose, break_on_hyphens=False),
        "",
        *made.heading,
        *(line for row in rows for line in row),
        made.rule,
        *total,
        "",
        *_left_out(description, made.left_out, prose),
        *textwrap.wrap(_conditions(description), prose),
        *_claim(description, prose),
    ]
    return "\n".join(lines)


def _left_out(description: Description, headings: Sequence[str], prose: int) -> list[str]:
    """What the table had no room for: configs, once each, and names of the other columns."""
    lines = []
    if "config" in headings:
        first: dict[tuple[str, str], int | None] = {}
        for row in description.blocks:
            first.setdefault((f"{row.glyph} {row.layer}", row.key_config), row.index)
        names = [name for name, _ in first]
        for (name, config), index in first.items():
            where = f", from block {index}" if names.count(name) > 1 else ""
            lines += textwrap.wrap(f"{name}{where}: {config}", prose, subsequent_indent="    ")
    others = [heading for heading in headings if heading not in ("config", "×")]
    if others:
        text = f"No room for {', '.join(others)}: widen the terminal, or see --json."
        lines += textwrap.wrap(text, prose, subsequent_indent="  ")
    return [*lines, ""] if lines else []


def to_html(description: Description) -> str:
    """The same as an HTML table for notebooks."""

    def cells(tag: str, texts: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"

    body = "".join(cells("td", row) for row in _body(description))
    claim = "".join(f"<p>{html.escape(line)}</p>" for line in _claim(description) if line)
    return (
        f"<p>{html.escape(_heading(description))}<br>"
        f"<code>{html.escape(description.pattern)}</code></p>"
        f"<table><thead>{cells('th', HEADINGS)}</thead><tbody>{body}</tbody></table>"
        f"<p>{html.escape(_conditions(description))}</p>{claim}"
    )


def _heading(description: Description) -> str:
    layout = description.layout
    tied = "tied" if layout.tie_embeddings else "not tied"
    return (
        f"{description.name or 'layout'} ({description.hash}): d_model {layout.d_model:,}, "
        f"vocabulary {layout.vocab_size:,} {tied}, {len(layout.blocks)} blocks"
    )


def _conditions(description: Description) -> str:
    sequences = (
        "1 sequence" if description.batch_size == 1 else f"{description.batch_size} sequences"
    )
    origin = f"{description.conditions_from}. " if description.conditions_from else ""
    total, active = description.total.parameters, description.active_parameters
    share = "" if active == total else f" {active:,} of the parameters are active for a token."
    return (
        f"Rows are for one block. Context {description.context:,} tokens; state of {sequences}; "
        f"{description.bytes_per_element} bytes an element where no quantizer stores it. {origin}"
        "FLOPs are one sequence's: a token of a forward pass on average, and a decode step at the "
        f"end.{share}"
    )


def _claim(description: Description, prose: int = WIDTH) -> list[str]:
    if description.preset is None:
        return []
    exact = f"{description.total.parameters:,}"
    stated = description.preset.stated_parameters or "none"
    width = max(len(exact), len("exact"))
    return [
        "",
        f"{'':10}  {'exact':>{width}}  stated (claimed)",
        f"{'parameters':10}  {exact:>{width}}  {stated}",
        "",
        *textwrap.wrap(f"Source: {description.preset.source}.", prose),
        *textwrap.wrap(description.preset.assumptions, prose),
    ]


def _body(description: Description) -> list[list[str]]:
    embedding, *rest = description.outside
    rows = [_cells("", "", embedding)]
    blocks = description.blocks
    numbers: dict[Hashable, int] = {}
    keys = [numbers.setdefault(_key(row), len(numbers)) for row in blocks]
    for start, unit, count in fold(keys):
        for offset in range(unit):
            label = _label(start + offset, unit, count)
            rows.append(_cells(label, str(count), blocks[start + offset]))
    rows += [_cells("", "", row) for row in rest]
    rows.append(_cells("total", str(len(blocks)), description.total, layer=""))
    return rows


def _key(row: Row) -> Hashable:
    figures = (row.parameters, row.forward_flops, row.decode_flops, row.weight_bytes)
    return (row.layer, str(row.config), row.quantizer, *figures, row.state_bytes)


def _label(first: int, unit: int, count: int) -> str:
    last = first + (count - 1) * unit
    if count == 1:
        return str(first)
    if unit == 1:
        return f"{first}–{last}"
    return f"{first}, {last}" if count == 2 else f"{first}, {first + unit} … {last}"


def _cells(label: str, count: str, row: Row, layer: str | None = None) -> list[str]:
    name = f"{row.glyph} {row.layer}".strip() if layer is None else layer
    return [
        label,
        count,
        name,
        row.key_config,
        row.quantizer or "",
        f"{row.parameters:,}",
        scaled(row.forward_flops, 1000, figures.COUNTS),
        scaled(row.decode_flops, 1000, figures.COUNTS),
        scaled(row.weight_bytes, 1024, figures.BYTES),
        scaled(row.state_bytes, 1024, figures.BYTES),
    ]


def scaled(value: float, base: int, prefixes: Sequence[str]) -> str:
    """Four digits and a unit prefix: `1.344 G`; a dash for nothing."""
    return figures.MISSING if value == 0 else figures.scaled(value, base, prefixes)
