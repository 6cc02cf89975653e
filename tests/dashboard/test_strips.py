"""Strips: one cell a block, one colour a layer type, and SVG that is well formed."""

from __future__ import annotations

import base64
from xml.etree import ElementTree

import pytest

from workbench.dashboard.strips import (
    COLOURS,
    GREYS,
    LONGEST,
    UNKNOWN,
    data_uri,
    legend_html,
    palette,
    pattern_svg,
    strip_html,
    strip_svg,
    strip_width,
)

SVG = "{http://www.w3.org/2000/svg}"


def test_colours_differ_and_do_not_depend_on_the_order():
    layers = ["mamba", "attention", "swiglu", "other"]
    colours = palette(layers, {"swiglu"})
    assert palette(reversed(layers), {"swiglu"}) == colours
    assert len(set(colours.values())) == 4
    assert colours["swiglu"] in GREYS
    assert {colours[name] for name in ("mamba", "attention", "other")} <= set(COLOURS)


@pytest.mark.parametrize("blocks", [1, 6, 48, 400])
def test_a_cell_a_block_in_order_within_the_width(blocks):
    pattern = ("M-A-" * blocks)[:blocks]
    colours = {"mamba": "#112233", "swiglu": "#445566", "attention": "#778899"}
    names = {"M": "mamba", "-": "swiglu", "A": "attention"}
    root = ElementTree.fromstring(pattern_svg(pattern, names, colours))
    cells = root.findall(f"{SVG}rect")
    assert [cell.get("fill") for cell in cells] == [colours[names[glyph]] for glyph in pattern]
    lefts = [float(cell.get("x")) for cell in cells]
    assert lefts == sorted(lefts)
    assert float(root.get("width")) <= strip_width(blocks) <= LONGEST
    written = [text.text for text in root.findall(f"{SVG}text")]
    assert written == (list(pattern) if blocks <= 6 else [])


def test_an_unknown_glyph_is_black_and_markup_is_escaped():
    root = ElementTree.fromstring(pattern_svg("<", {}, {}))
    assert root.find(f"{SVG}rect").get("fill") == UNKNOWN
    assert root.find(f"{SVG}text").text == "<"
    assert "<script>" not in strip_html("M", ["#000000"], ["<script>"])
    assert "<script>" not in legend_html({}, {"<script>": "#000000"})


def test_a_glyph_reads_on_its_colour():
    for colour, ink in (("#FFFFFF", "#000000"), ("#000000", "#FFFFFF"), ("#F0E442", "#000000")):
        assert (
            ElementTree.fromstring(strip_svg("M", [colour])).find(f"{SVG}text").get("fill") == ink
        )


def test_the_address_holds_the_picture():
    svg = strip_svg("M", ["#0072B2"])
    kind, _, content = data_uri(svg).partition(",")
    assert kind == "data:image/svg+xml;base64"
    assert base64.b64decode(content).decode() == svg
