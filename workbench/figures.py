"""Figures as people read them: four digits, and a unit prefix where the unit takes one."""

from __future__ import annotations

import math
from collections.abc import Sequence

BYTES = ("B", "KiB", "MiB", "GiB", "TiB")
COUNTS = ("", "k", "M", "G", "T", "P")
MISSING = "–"


def figure(value: float | None, unit: str = "") -> str:
    """A figure for people: bytes, parameters and FLOPs scaled, others to four digits.

    Args:
        value: in `unit`; None becomes a dash.
    """
    if value is None:
        return MISSING
    if unit == "bytes":
        return scaled(value, 1024, BYTES)
    if unit == "parameters" or unit.startswith("FLOPs"):
        return scaled(value, 1000, COUNTS)
    return digits(value)


def scaled(value: float, base: int, prefixes: Sequence[str]) -> str:
    """A figure with a unit prefix, to four digits (`1.500 GiB`); whole below the first prefix."""
    power = 0
    while abs(value) >= base and power + 1 < len(prefixes):
        value, power = value / base, power + 1
    text = f"{value:,.0f}" if power == 0 else _four_digits(value)
    return f"{text} {prefixes[power]}".strip()


def digits(value: float) -> str:
    """Four significant digits; whole numbers and large ones as whole numbers."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return _four_digits(value)


def _four_digits(value: float) -> str:
    # Trailing zeros stay, so that a column's points align.
    return f"{value:#.4g}".rstrip(".")
