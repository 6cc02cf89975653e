"""A preset's Description as text that says what it was computed from, and back.

An entry is the sha256 of all that follows its first line, then JSON. What it was computed from is
the writer's to say and the reader's to compare: `description_cache.py` and
`description_shipped.py` do so, each in its way.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from workbench.description import Description, Row
from workbench.layout import Layout
from workbench.preset import Preset

FORMAT = 2


def write_entry(description: Description, made_from: Mapping[str, Any]) -> str:
    """An entry of a preset's description.

    Args:
        made_from: all that it depends on: JSON data.
    """
    entry = {"format": FORMAT, "made_from": made_from, "description": _packed(description)}
    content = json.dumps(entry, allow_nan=False)
    return f"{_sha256(content)}\n{content}"


def read_entry(text: str) -> dict[str, Any] | None:
    """What a whole entry holds; None for any other text.

    Its `made_from` is to be compared before it is `described`.
    """
    checksum, _, content = text.partition("\n")
    if checksum != _sha256(content):
        return None
    entry = json.loads(content)
    return entry if isinstance(entry, dict) and entry.get("format") == FORMAT else None


def described(entry: Mapping[str, Any]) -> Description:
    """The Description of an entry; other sources than those of now may know other fields."""
    data = entry["description"]
    layout = Layout.from_dict(data["layout"])
    changed = {
        "layout": layout,
        "blocks": tuple(Row(**row) for row in data["blocks"]),
        "outside": tuple(Row(**row) for row in data["outside"]),
        "total": Row(**data["total"]),
        "preset": Preset(layout=lambda: layout, **data["preset"]),
    }
    return Description(**(data | changed))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _packed(description: Description) -> dict[str, Any]:
    data = {
        field.name: getattr(description, field.name) for field in dataclasses.fields(Description)
    }
    preset = description.preset
    assert preset is not None
    return data | {
        "layout": description.layout.to_dict(),
        "blocks": [dataclasses.asdict(row) for row in description.blocks],
        "outside": [dataclasses.asdict(row) for row in description.outside],
        "total": dataclasses.asdict(description.total),
        "preset": {
            "source": preset.source,
            "stated_parameters": preset.stated_parameters,
            "assumptions": preset.assumptions,
        },
    }
