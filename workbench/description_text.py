"""A Description as text and as HTML: runs of equal blocks folded, figures scaled for people."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workbench.description import Description, Row

WIDTH = 100
HEADINGS = (
    "block", "×", "layer", "config", "stored as", "parameters",
    "FLOPs/token", "decode FLOPs", "weights", "state",
)  # fmt: skip
FIRST_FIGURE = HEADINGS.index("parameters")


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


def to_text(description: Description) -> str:
    """A plain table for terminals."""
    lines = [_heading(description), *textwrap.wrap(description.pattern, WIDTH), ""]
    body = _body(description)
    widths = [max(map(len, column)) for column in zip(HEADINGS, *body, strict=True)]
    for cells in (HEADINGS, *body):
        aligned = [
            cell.rjust(width) if column >= FIRST_FIGURE else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join(aligned).rstrip())
    lines.insert(-1, "─" * max(map(len, lines)))
    lines += ["", *textwrap.wrap(_conditions(description), WIDTH), *_claim(description)]
    return "\n".join(lines)


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
    return (
        f"Rows are for one block. Context {description.context:,} tokens; state of {sequences}; "
        f"{description.bytes_per_element} bytes an element where no quantizer stores it. FLOPs "
        "are one sequence's: a token of a forward pass on average, and a decode step at the end."
    )


def _claim(description: Description) -> list[str]:
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
        *textwrap.wrap(f"Source: {description.preset.source}.", WIDTH),
        *textwrap.wrap(description.preset.assumptions, WIDTH),
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
        scaled(row.forward_flops, 1000, ("", "k", "M", "G", "T")),
        scaled(row.decode_flops, 1000, ("", "k", "M", "G", "T")),
        scaled(row.weight_bytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB")),
        scaled(row.state_bytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB")),
    ]


def scaled(value: float, base: int, prefixes: Sequence[str]) -> str:
    """Four digits and a unit prefix: `1.344 G`; a dash for nothing."""
    if value == 0:
        return "–"
    power = 0
    while value >= base and power + 1 < len(prefixes):
        value, power = value / base, power + 1
    text = f"{value:,.0f}" if power == 0 else f"{value:.4g}"
    return f"{text} {prefixes[power]}".strip()
