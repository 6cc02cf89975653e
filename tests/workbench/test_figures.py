"""Figures as people read them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.figures import BYTES, digits, figure, scaled


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "ms", "–"),
        (2.96, "bits/byte", "2.960"),
        (0.98889, "ms", "0.9889"),
        (12.4, "per token", "12.40"),
        (3, "layers", "3"),
        (0, "", "0"),
        (-0.5, "", "-0.5000"),
        (50_257.3, "per token", "50,257"),
        (999, "bytes", "999 B"),
        (1024, "bytes", "1.000 KiB"),
        (1023 * 1024, "bytes", "1023 KiB"),
        (1.5 * 2**30, "bytes", "1.500 GiB"),
        (2**52, "bytes", "4096 TiB"),
        (129_135_360, "parameters", "129.1 M"),
        (1000, "FLOPs/token", "1.000 k"),
        (math.inf, "ms", "inf"),
        (math.nan, "", "nan"),
    ],
)
def test_figure(value: float | None, unit: str, text: str) -> None:
    assert figure(value, unit) == text


@given(st.floats(1e-3, 1e12))
def test_digits_keep_four_of_them(value: float) -> None:
    assert float(digits(value).replace(",", "")) == pytest.approx(value, rel=5.1e-4)


@given(st.integers(0, 2**55))
def test_scaled_keeps_four_digits(value: int) -> None:
    number, prefix = scaled(value, 1024, BYTES).split()
    assert float(number.replace(",", "")) * 1024 ** BYTES.index(prefix) == pytest.approx(
        value, rel=5.1e-4
    )
