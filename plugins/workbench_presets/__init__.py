"""Known systems as Layouts: the published Mamba and Mamba-2 sizes, and those of five documents.

Each preset keeps the parameter count that its source states apart from the exact one, which
`workbench.describe` counts.
"""

from __future__ import annotations

from workbench.hookspecs import Register, hookimpl
from workbench.preset import Preset
from workbench_presets import documents, published


@hookimpl
def register_presets(register: Register[Preset]) -> None:
    for name, preset in {**published.presets(), **documents.presets()}.items():
        register(name, preset)
