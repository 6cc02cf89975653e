"""Layouts as coloured strips: one cell a block from the input up, one colour a layer type."""

from __future__ import annotations

import base64
import html
from collections.abc import Collection, Iterable, Mapping, Sequence

# Told apart with any colour vision (after Okabe and Ito), on white and on dark grounds.
COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#882255",
)  # fmt: skip
GREYS = ("#8C939C", "#B9BEC5", "#636973")  # MLPs: between the mixers, not among them
UNKNOWN = "#000000"
HEIGHT = 22
GAP = 2
WIDEST = 18  # a cell, in pixels
LONGEST = 320  # a strip, in pixels: cells of deep models are narrower
NARROWEST_WITH_GLYPH = 10


def palette(layers: Iterable[str], mlps: Collection[str] = ()) -> dict[str, str]:
    """A colour for each layer type, the same whatever the order; MLPs are grey."""
    names = sorted(set(layers))
    mixers = [name for name in names if name not in mlps]
    greys = [name for name in names if name in mlps]
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(mixers)}
    colours.update({name: GREYS[index % len(GREYS)] for index, name in enumerate(greys)})
    return colours


def strip_svg(pattern: str, colours: Sequence[str]) -> str:
    """A strip as SVG text.

    Args:
        pattern: a glyph a block, written into its cell where the cell is wide enough.
        colours: of each block's cell.
    """
    width = min(float(WIDEST), LONGEST / max(1, len(pattern)))
    gap = GAP if width >= NARROWEST_WITH_GLYPH else width * 0.1
    cells = []
    for index, (glyph, colour) in enumerate(zip(pattern, colours, strict=True)):
        left = index * width
        text = _glyph(glyph, left + (width - gap) / 2, colour)
        cells.append(
            f'<rect x="{left:.2f}" y="0" width="{width - gap:.2f}" height="{HEIGHT}" '
            f'rx="{min(3.0, width / 4):.2f}" fill="{colour}"/>'
            f"{text if width >= NARROWEST_WITH_GLYPH else ''}"
        )
    total = max(1.0, len(pattern) * width - gap)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total:.2f}" height="{HEIGHT}" '
        f'viewBox="0 0 {total:.2f} {HEIGHT}">{"".join(cells)}</svg>'
    )


def pattern_svg(pattern: str, names: Mapping[str, str], colours: Mapping[str, str]) -> str:
    """The strip of a pattern of glyphs.

    Args:
        names: glyph → layer name; a glyph without one is black.
        colours: layer name → colour.
    """
    return strip_svg(pattern, [colours.get(names.get(glyph, ""), UNKNOWN) for glyph in pattern])


def strip_width(blocks: int) -> float:
    """How wide the strip of so many blocks is, in pixels."""
    return min(float(WIDEST * blocks), float(LONGEST))


def strip_html(pattern: str, colours: Sequence[str], titles: Sequence[str]) -> str:
    """A strip as HTML, over several lines if need be; `titles` show under the pointer."""
    # Streamlit's sanitizer takes SVG out of HTML, but leaves images.
    cells = "".join(
        f'<img src="{data_uri(strip_svg(glyph, [colour]))}" title="{html.escape(title)}">'
        for glyph, colour, title in zip(pattern, colours, titles, strict=True)
    )
    return f'<div style="display:flex;flex-wrap:wrap;gap:{GAP}px">{cells}</div>'


def data_uri(svg: str) -> str:
    """An SVG text as an address that an image can have."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def legend_html(glyphs: Mapping[str, str], colours: Mapping[str, str]) -> str:
    """Swatches of layer types as HTML.

    Args:
        glyphs: layer name → its glyph.
        colours: layer name → colour.
    """
    items = "".join(
        '<span style="display:inline-flex;align-items:center;gap:6px">'
        f"{strip_html(glyphs.get(name, '?'), [colour], [name])}{html.escape(name)}</span>"
        for name, colour in colours.items()
    )
    return (
        '<div style="display:flex;flex-wrap:wrap;gap:4px 18px;font-size:14px;opacity:0.85">'
        f"{items}</div>"
    )


def _glyph(glyph: str, middle: float, colour: str) -> str:
    ink = "#000000" if _luminance(colour) > 0.36 else "#FFFFFF"
    return (
        f'<text x="{middle:.2f}" y="{HEIGHT - 6}" text-anchor="middle" font-size="13" '
        f'font-family="ui-monospace,monospace" font-weight="600" fill="{ink}">'
        f"{html.escape(glyph)}</text>"
    )


def _luminance(colour: str) -> float:
    """Relative luminance of `#RRGGBB`, 0 to 1, as WCAG 2 defines it."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in channels
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
