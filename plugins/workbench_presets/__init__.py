"""Known systems as Layouts: published models, and those of five project documents.

Each preset keeps the parameter count that its source states apart from the exact one, which
`workbench.describe` counts.
"""

from __future__ import annotations

from workbench.hookspecs import Register, hookimpl
from workbench.preset import Preset
from workbench_presets import decoders, documents, granite, hybrids, published


@hookimpl
def register_presets(register: Register[Preset]) -> None:
    for family in (published, hybrids, granite, decoders, documents):
        for name, preset in family.presets().items():
            register(name, preset)
