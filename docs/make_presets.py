"""Writes docs/presets.md: exact counts of every preset beside transformers' and what is claimed.

python docs/make_presets.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from workbench.builder import Builder, default_builder
from workbench.description import STATED

PLUGINS = Path(__file__).parents[1] / "plugins"
# Beside the presets of a package: name → transformers' class and the values of config.json.
CONFIGS = "published_configs.json"

HEAD = """# Presets

Exact counts come from the layers' formulas ([costs](costs.md)). transformers' counts are those of
its own class on the meta device, made from the published configuration
(`published_configs.json` beside the presets); a dash stands where there is neither or only one.
What a document states is its claim and is not corrected. `workbench describe NAME` gives a row a
block. Made by `docs/make_presets.py`.
"""
ELSEWHERE = """
## In packages of their own

They need layers that are not built in: install the package, or give its folder to `--plugin-dir`.
"""
OPEN = "\n## Where the figures come from, and what was filled in\n\n"


def page() -> str:
    """The whole page as Markdown: what this repository holds, whatever else is installed."""
    folders = _packages_with_presets()
    installed = default_builder()
    loaded = {plugin.module for plugin in installed.plugins.loaded.values()}
    missing = [folder for folder in folders if not loaded & {p.stem for p in folder.glob("*.py")}]
    builder = default_builder(tuple(map(str, missing))) if missing else installed
    if builder.plugins.failures:
        raise RuntimeError(f"plugins that did not load: {builder.plugins.failures}")
    homes = {name: Path(builder.presets.provenance(name).file).parent for name in builder.presets}
    built_in = [name for name in homes if homes[name] == PLUGINS / "workbench_presets"]
    others = [name for name in homes if homes[name] in folders]
    counts = {
        name: count
        for home in {homes[name] for name in built_in + others}
        for name, count in transformers_counts(home / CONFIGS).items()
    }
    text = HEAD + "\n" + _table(builder, built_in, counts)
    if others:
        text += ELSEWHERE + "\n" + _table(builder, others, counts)
    notes = {name: builder.presets[name].assumptions for name in sorted(built_in + others)}
    return text + OPEN + "\n".join(f"- **{n}**: {note}" for n, note in notes.items() if note) + "\n"


def _packages_with_presets() -> list[Path]:
    """Folders of distributions under plugins/ that offer presets."""
    return [
        project.parent
        for project in sorted(PLUGINS.glob("*/pyproject.toml"))
        if any("def register_presets" in file.read_text() for file in project.parent.glob("*.py"))
    ]


def transformers_counts(configs: Path) -> dict[str, int]:
    """What transformers' classes count for the published configurations in a file, if it is there.

    Tied weights count once; nothing is allocated.
    """
    if not configs.exists():
        return {}
    transformers.logging.set_verbosity_error()
    published: dict[str, dict[str, Any]] = json.loads(configs.read_text())
    counts = {}
    for name, entry in published.items():
        if "model" not in entry:  # a relative's, kept for what it tells of the others
            continue
        model_class = getattr(transformers, entry["model"])
        with torch.device("meta"):
            model = model_class(model_class.config_class(**entry["config"]))
        model.tie_weights()
        counts[name] = sum(parameter.numel() for parameter in model.parameters())
    return counts


def _table(builder: Builder, names: list[str], counts: dict[str, int]) -> str:
    lines = [
        f"| preset | exact parameters | transformers' count | {STATED} | source |",
        "|---|---:|---:|---|---|",
    ]
    for name in names:
        preset = builder.presets[name]
        exact = builder.costs(preset.layout(), length=1).total.parameters
        theirs = f"{counts[name]:,}" if name in counts else "–"
        stated = preset.stated_parameters or "–"
        lines.append(f"| {name} | {exact:,} | {theirs} | {stated} | {preset.source} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "presets.md").write_text(page(), encoding="utf-8")
