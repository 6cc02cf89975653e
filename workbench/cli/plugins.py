"""`workbench plugins`: everything registered, and where it came from."""

from __future__ import annotations

import dataclasses
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli.common import Json, PluginDirs, builder, print_json, print_table, say
from workbench.provenance import SHORT
from workbench.text_table import Column

if TYPE_CHECKING:
    from workbench.discovery import Plugins

EXAMPLES = """\
  workbench plugins
  workbench plugins --plugin-dir my_layers --traceback
  WORKBENCH_DISABLE=export workbench plugins --json"""


def plugins(
    plugin_dir: PluginDirs = None,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show why plugins did not load, in full.")
    ] = False,
    json: Json = False,
) -> None:
    """List what plugins offer, and where each came from.

    Layers, placements, quantizers, metrics, data sources, exporters and presets; package, version,
    sources (sha256) and file of each plugin; and which could not be loaded, and why.
    WORKBENCH_DISABLE=NAME,NAME leaves plugins out.
    """
    known = builder(plugin_dir)
    rows: list[dict[str, Any]] = [
        {
            "kind": kind,
            "name": name,
            **registry.provenance(name).to_dict(),
            "about": about(registry[name]),
        }
        for kind, registry in known.registries().items()
        for name in registry
    ]
    if json:
        print_json({"registered": rows, **_not_loaded(known.plugins)})
        return
    print_table(_thing_columns(rows))
    print_table(_plugin_columns(known.plugins))
    if known.plugins.disabled:
        say(f"Disabled by WORKBENCH_DISABLE: {', '.join(known.plugins.disabled)}")
    for failure in known.plugins.failures.values():
        say(f"Plugin {failure.plugin!r} did not load: {failure.reason}")
        if traceback and failure.traceback:
            print(failure.traceback)
    if any(failure.traceback for failure in known.plugins.failures.values()) and not traceback:
        say("workbench plugins --traceback shows where.")


def about(thing: Any) -> str:
    """One line on a registered thing: what its docstring begins with, or a preset's source."""
    text = (thing.__doc__ or "") if isinstance(thing, type) else thing.source
    return str(text).strip().partition("\n")[0]


def _not_loaded(found: Plugins) -> dict[str, Any]:
    failures = found.failures.values()
    return {
        "failed": [
            {field.name: getattr(failure, field.name) for field in dataclasses.fields(failure)}
            for failure in failures
        ],
        "disabled": list(found.disabled),
    }


def _thing_columns(rows: list[dict[str, Any]]) -> list[Column]:
    kinds = [
        kind.replace("_", " ") if index == 0 else ""
        for kind, group in groupby(row["kind"] for row in rows)
        for index, _ in enumerate(group)
    ]
    return [
        Column(heading="kind", cells=kinds),
        Column(heading="name", cells=[row["name"] for row in rows]),
        Column(heading="plugin", cells=[row["plugin"] for row in rows]),
        Column(heading="about", cells=[row["about"] for row in rows], fit="cut", rank=1),
    ]


def _plugin_columns(found: Plugins) -> list[Column]:
    loaded = found.loaded.values()
    return [
        Column(heading="plugin", cells=[plugin.plugin for plugin in loaded]),
        Column(heading="package", cells=[plugin.package or "–" for plugin in loaded]),
        Column(heading="version", cells=[plugin.version for plugin in loaded]),
        Column(heading="sha256", cells=[plugin.sha256[:SHORT] for plugin in loaded], rank=1),
        Column(heading="file", cells=[plugin.file for plugin in loaded], fit="wrap"),
    ]
