"""Preset: a named Layout of a known system, with what its document claims beside it. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from workbench.layout import Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A known system as a Layout.

    Attributes:
        layout: makes the Layout; called when it is asked for.
        source: the document or repository that its figures come from.
        stated_parameters: the parameter count that this document states, as it words it
            (`"~2.1B"`); a claim, never mixed with the exact count. None where it states none.
        assumptions: what the document leaves open and how it was filled in.
    """

    layout: Callable[[], Layout]
    source: str
    stated_parameters: str | None = None
    assumptions: str = ""
