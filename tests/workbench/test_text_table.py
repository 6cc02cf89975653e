"""Tables that fit: figures are never cut, and what is left out is said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.text_table import Column, table

COLUMNS = [
    Column(heading="trial", cells=["7", "12"], right=True),
    Column(heading="bits_per_byte", cells=["2.960", "12.40"], right=True),
    Column(heading="memory_bytes", cells=["850.5 KiB", "–"], right=True),
    Column(heading="parameters", cells=["1.5 M", "3.2 k"], right=True, rank=1),
    Column(heading="perplexity", cells=["7.780", "8.1"], right=True, rank=2),
    Column(heading="reason", cells=["", "two ends of 2 leave nothing between"], fit="wrap"),
]
FIGURES = [cell for column in COLUMNS if column.fit == "whole" for cell in column.cells]


def test_a_table_without_limit() -> None:
    assert str(table(COLUMNS[:3])).splitlines() == [
        "trial  bits_per_byte  memory_bytes",
        "──────────────────────────────────",
        "    7          2.960     850.5 KiB",
        "   12          12.40             –",
    ]


def test_headings_break_before_columns_go() -> None:
    made = table(COLUMNS[:4], 38)
    assert made.left_out == []
    assert made.heading == [
        "          bits_    memory_",
        "trial  per_byte      bytes  parameters",
        "──────────────────────────────────────",
    ]
    assert table(COLUMNS[:4], 37).left_out == ["parameters"]


@pytest.mark.parametrize("width", range(48, 120, 3))
def test_every_line_fits_and_no_figure_is_broken(width: int) -> None:
    made = table(COLUMNS, width)
    lines = str(made).splitlines()
    assert max(map(len, lines)) <= width
    shown = [c for c in COLUMNS if c.heading not in made.left_out]
    for column in shown:
        if column.fit == "whole":
            for cell in column.cells:
                assert cell in str(made)
    # The highest rank goes first, rank 0 never.
    assert made.left_out in ([], ["perplexity"], ["parameters", "perplexity"])
    assert " ".join(str(made).split()).count("nothing") == 1


def test_more_room_never_shows_less() -> None:
    counts = [len(table(COLUMNS, width).left_out) for width in range(40, 140)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 2
    assert counts[-1] == 0


def test_what_cannot_fit_overflows_whole() -> None:
    made = table(COLUMNS[:3], 10)
    assert "850.5 KiB" in str(made)
    assert made.left_out == []


def test_text_is_cut_to_one_line_or_wrapped() -> None:
    text = "Convolution and selective scan between two projections"
    name = Column(heading="name", cells=["mamba"])
    cut = table([name, Column(heading="about", cells=[text], fit="cut")], 30)
    assert [len(row) for row in cut.rows] == [1]
    assert cut.rows[0][0].endswith("…")
    wrapped = table([name, Column(heading="about", cells=[text], fit="wrap")], 30)
    assert len(wrapped.rows[0]) == 3
    assert " ".join(" ".join(line[7:] for line in wrapped.rows[0]).split()) == text


def test_paths_break_after_slashes_and_lose_nothing() -> None:
    path = "/home/someone/projects/search/plugins/workbench_attention/__init__.py"
    made = table([Column(heading="file", cells=[path], fit="wrap")], 40)
    assert all(line.endswith("/") for line in made.rows[0][:-1])
    assert "".join(made.rows[0]) == path


def test_columns_without_text_are_not_shown() -> None:
    made = table([COLUMNS[0], Column(heading="stored as", cells=["", ""])])
    assert made.heading[0] == "trial"
    assert made.left_out == []


def test_an_empty_table() -> None:
    assert str(table([], 80)).strip() == ""
    assert table([Column(heading="study", cells=[])], 80).rows == []


@given(
    st.lists(st.lists(st.text("abc_/ 19", max_size=12), min_size=3, max_size=3), min_size=1),
    st.integers(1, 60),
)
def test_any_cells_at_any_width(rows: list[list[str]], width: int) -> None:
    cells = [list(column) for column in zip(*rows, strict=True)]
    columns = [
        Column(heading="first_heading", cells=cells[0], rank=2),
        Column(heading="x", cells=cells[1], right=True, rank=1),
        Column(heading="some words", cells=cells[2], fit="wrap"),
    ]
    made = table(columns, width)
    assert len(made.rows) == len(rows)
    assert {c.heading for c in columns} >= set(made.left_out)
