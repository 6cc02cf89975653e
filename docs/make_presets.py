"""Writes docs/presets.md: exact parameter counts of every preset beside what its document states.

python docs/make_presets.py
"""

from __future__ import annotations

from pathlib import Path

from workbench.api import preset_table
from workbench.builder import default_builder

HEAD = """# Presets

Exact counts come from the layers' formulas ([costs](costs.md)); what a document states is its
claim and is not corrected. `workbench describe NAME` gives a row a block. Made by
`docs/make_presets.py`.

"""


def page() -> str:
    """The whole page as Markdown."""
    presets = default_builder().presets
    notes = [
        f"- **{name}**: {presets[name].assumptions}"
        for name in presets
        if presets[name].assumptions
    ]
    filled = "\n## What the documents leave open, and how it was filled in\n\n"
    return HEAD + preset_table() + "\n" + filled + "\n".join(notes) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "presets.md").write_text(page(), encoding="utf-8")
