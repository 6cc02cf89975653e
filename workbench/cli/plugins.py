"""`workbench plugins`: everything registered, and where it came from."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from workbench.cli.common import Json, PluginDirs, builder, console, print_json, table

EXAMPLE = "Examples: workbench plugins · WORKBENCH_DISABLE=export workbench plugins --json"


def plugins(
    plugin_dir: PluginDirs = None,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show why plugins did not load, in full.")
    ] = False,
    json: Json = False,
) -> None:
    """List layers, placements, quantizers, metrics, data sources, exporters and presets.

    WORKBENCH_DISABLE=name,… leaves plugins out.
    """
    known = builder(plugin_dir)
    rows: list[dict[str, Any]] = [
        {"kind": kind, "name": name, **registry.provenance(name).to_dict()}
        for kind, registry in known.registries().items()
        for name in registry
    ]
    failures = known.plugins.failures.values()
    if json:
        print_json(
            {
                "registered": rows,
                "failed": [
                    {"plugin": f.plugin, "module": f.module, "reason": f.reason} for f in failures
                ],
                "disabled": list(known.plugins.disabled),
            }
        )
        return
    out = console()
    columns = ["kind", "name", "plugin", "package", "version", "file"]
    texts = [[row[column] or "–" for column in columns] for row in rows]
    out.print(table(None, columns, texts))
    if known.plugins.disabled:
        out.print(f"Disabled by WORKBENCH_DISABLE: {', '.join(known.plugins.disabled)}")
    for failure in failures:
        out.print(f"Plugin {failure.plugin!r} did not load: {failure.reason}", markup=False)
        if traceback:
            out.print(failure.traceback, markup=False)
