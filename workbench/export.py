"""From a trial's record to an exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workbench import config as configs
from workbench.builder import Builder, default_builder
from workbench.environment import package_versions
from workbench.exporter import ExportReport
from workbench.records import Study, Trial
from workbench.study_config import StudyConfig
from workbench.trial import load_trained


def trial_builder(trial: Trial, plugin_dirs: tuple[Path, ...] = ()) -> tuple[Builder, StudyConfig]:
    """A builder that knows the plugins of the trial's study, and the study's config."""
    config = StudyConfig.from_dict(Study(trial.path.parents[1]).data["config"])
    folders = dict.fromkeys([*config.plugin_dirs, *(str(f.resolve()) for f in plugin_dirs)])
    return default_builder(tuple(folders)), config


def export_trial(
    trial: Trial,
    out: Path,
    exporter: str = "huggingface",
    plugin_dirs: tuple[Path, ...] = (),
    runs: str | Path | None = None,
) -> ExportReport:
    """Write a complete trial's model, quantized as its layout says, to the new folder `out`.

    Raises:
        UnknownNameError: no such exporter.
        WorkbenchError: the trial left no weights, `out` is there, or the proof failed.
    """
    builder, config = trial_builder(trial, plugin_dirs)
    exporter_class = builder.exporters[exporter]
    model = load_trained(builder, trial.layout, trial.weights)
    metadata: dict[str, Any] = {
        "study": trial.study,
        "trial": trial.number,
        "metrics": trial.metrics,
        "units": Study(trial.path.parents[1]).units,
        "environment": trial.environment,
        "provenance": trial.data.get("provenance", {}),
        "versions": package_versions(),
        "data": config.data,
        "tokenizer": tokenizer_of(config),
    }
    exporter_config: Any = configs.from_dict(exporter_class.Config, {})
    return exporter_class.export(model, builder, out, exporter_config, metadata)


def tokenizer_of(config: StudyConfig) -> dict[str, str] | None:
    """How the study's data became tokens, from its `[data]` table.

    `{"kind": "hf", "name_or_path": …}` for a named tokenizer, `{"kind": "bytes"}` for a source of
    text without one, None for a synthetic task.
    """
    if config.data.get("tokenizer"):
        return {"kind": "hf", "name_or_path": config.data["tokenizer"]}
    return {"kind": "bytes"} if config.data["source"] in ("stdlib", "text") else None
