"""The Python files of an exported model: transformers' side, and the layers' own sources."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping

from workbench.builder import Builder
from workbench.errors import WorkbenchError
from workbench.layout import Layout
from workbench_export.vendoring import vendor

MODELING = "workbench_export.modeling_workbench"
REGISTERED = "workbench_export.registered"
STEMS = {
    MODELING: "modeling_workbench",
    "workbench_export.configuration_workbench": "configuration_workbench",
}
AUTO_MAP = {
    "AutoConfig": "configuration_workbench.WorkbenchConfig",
    "AutoModel": "modeling_workbench.WorkbenchModel",
    "AutoModelForCausalLM": "modeling_workbench.WorkbenchForCausalLM",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCode:
    """The files and what is known of them.

    Attributes:
        files: name → text.
        packages: top-level packages that they were copied from, and must do without.
        foreign: other packages that they import unconditionally.
        layers, quantizers: registered name → (file, class).
    """

    files: dict[str, str]
    packages: frozenset[str]
    foreign: frozenset[str]
    layers: dict[str, tuple[str, str]]
    quantizers: dict[str, tuple[str, str]]


def model_code(layout: Layout, builder: Builder) -> ModelCode:
    """The code that a model of this layout needs.

    Raises:
        WorkbenchError: a layer's or quantizer's source cannot be copied; says why.
    """
    layers = {block.layer: builder.layers[block.layer] for block in layout.blocks}
    quantizers = {
        block.quantizer.name: builder.quantizers[block.quantizer.name]
        for block in layout.blocks
        if block.quantizer is not None
    }
    things: list[type] = [*layers.values(), *quantizers.values()]
    packages = _packages(builder, things)
    modules = [MODELING, *(thing.__module__ for thing in things)]
    vendored = vendor(modules, packages, stems=STEMS, without={REGISTERED})
    stems = vendored.stems
    files = vendored.files | {f"{stems[REGISTERED]}.py": _registered(stems, layers, quantizers)}
    return ModelCode(
        files=files,
        packages=packages,
        foreign=vendored.foreign,
        layers=_homes(stems, layers),
        quantizers=_homes(stems, quantizers),
    )


def _packages(builder: Builder, things: Iterable[type]) -> frozenset[str]:
    """The workbench, its plugins and whatever the layers come from."""
    modules = [found.module for found in builder.plugins.loaded.values()]
    modules += ["workbench", __name__, *(thing.__module__ for thing in things)]
    return frozenset(module.partition(".")[0] for module in modules)


def _registered(
    stems: Mapping[str, str], layers: Mapping[str, type], quantizers: Mapping[str, type]
) -> str:
    """The text of `workbench_export.registered` with its tables filled."""
    lines = [
        '"""The layer types and quantizers of this model, by their names in its layout."""',
        "",
    ]
    tables = []
    for table, things in (("LAYERS", layers), ("QUANTIZERS", quantizers)):
        tables += ["", f"{table} = {{"]
        for number, (name, thing) in enumerate(things.items()):
            _require_top_level(name, thing)
            stem, local = stems[thing.__module__], f"{table}_{number}"
            lines.append(f"from .{stem} import {thing.__qualname__} as {local}")
            tables.append(f'    "{name}": {local},')
        tables.append("}")
    return "\n".join([*lines, *tables, ""])


def _require_top_level(name: str, thing: type) -> None:
    module = inspect.getmodule(thing)
    if module is None or getattr(module, thing.__qualname__, None) is not thing:
        raise WorkbenchError(
            f"{name!r} is the class {thing.__qualname__} of {thing.__module__}, which no import "
            "statement can reach: define it at the top level of a module of your plugin."
        )


def _homes(stems: Mapping[str, str], things: Mapping[str, type]) -> dict[str, tuple[str, str]]:
    return {
        name: (f"{stems[thing.__module__]}.py", thing.__qualname__)
        for name, thing in things.items()
    }
