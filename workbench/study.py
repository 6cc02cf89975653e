"""Runs a study: create, resume or join, ask, judge, record, tell."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import Any

from workbench import storage
from workbench.builder import Builder, default_builder
from workbench.environment import resolve_device
from workbench.errors import FieldError, UnknownNameError
from workbench.executors import open_executor
from workbench.identity import identity, refuse_change
from workbench.ledger import JUDGED, Ledger, objectives_of, study_facts
from workbench.parents import Parent, joined
from workbench.records import Study, runs_folder
from workbench.reporter import Reporter
from workbench.rungs import Rungs
from workbench.scheduler import Scheduler
from workbench.space import Space, require
from workbench.storage_url import Store, chosen
from workbench.study_config import StudyConfig
from workbench.trial import Workplace

__all__ = ["JUDGED", "Reporter", "run_study"]


def run_study(
    config: StudyConfig,
    runs: str | Path | None = None,
    reporter: Reporter | None = None,
    storage_url: str | None = None,
) -> Study:
    """Run a study up to its budget, resuming what is there; returns its records.

    Where another process runs the study already, this one joins it.

    Args:
        storage_url: of Optuna's storage; else `WORKBENCH_STORAGE`, else the study's, else a file
            in its folder. Its password is recorded and shown nowhere.

    Raises:
        WorkbenchError: a mistake in the study (before any work), a folder that holds another
            study, or a storage that cannot be reached.
        KeyboardInterrupt: Ctrl-C; what was in flight is recorded and runs again.
    """
    builder = default_builder(config.plugin_dirs)
    try:
        device = resolve_device(config.runtime.device)
    except FieldError as error:
        raise error.within("runtime") from None
    folder = runs_folder(runs) / config.name
    cache_dir = runs_folder(runs) / ".cache"
    try:
        _check_names(config, builder)
        place = Workplace(config, builder, device, cache_dir)
        space = Space(config.space, builder, place.data.vocab_size)
    except UnknownNameError as error:
        hint = " ".join(filter(None, (error.hint, _forgotten_folders(folder, config))))
        raise UnknownNameError(error.kind, error.name, error.known, hint) from None
    rungs = Rungs(config.rungs, place.metrics, config.objectives, place.training.steps)
    storage.make_sampler(config.sampler, 0)
    place.probe()
    facts = identity(place, space)
    refuse_change(folder, facts, config.name)
    runtime = config.runtime
    store = chosen(storage_url, runtime.storage, runtime.storage_patience)
    reporter = reporter or Reporter()
    with (
        contextlib.closing(open_executor(place, cache_dir)) as executor,
        joined(folder) as parent,
        storage.reporting_failures(folder, store),
    ):
        ledger = _open(place, space, parent, store, reporter, facts)
        Scheduler(place, space, ledger, rungs, reporter, executor).run()
    return Study(folder)


def _check_names(config: StudyConfig, builder: Builder) -> None:
    """Refuse metrics and data sources that do not exist, naming the field that asks for them."""
    for registry, field, names in (
        (builder.metrics, "objectives", config.objectives),
        (builder.metrics, "report", config.report),
        (builder.metrics, "constraints", tuple(config.constraints)),
        (builder.data_sources, "data.source", (config.data["source"],)),
    ):
        for name in names:
            require(registry, name, field)


def _forgotten_folders(folder: Path, config: StudyConfig) -> str:
    """Which plugin folders the study was made with and now is without; empty for none."""
    if not (folder / "study.json").exists():
        return ""
    before = Study(folder).data["config"].get("plugin_dirs", ())
    missing = [name for name in before if name not in config.plugin_dirs]
    if not missing:
        return ""
    options = " ".join(f"--plugin-dir {shlex.quote(name)}" for name in missing)
    return f"The study was made with the plugins of {', '.join(missing)}: add {options}."


def _open(
    place: Workplace,
    space: Space,
    parent: Parent,
    store: Store,
    reporter: Reporter,
    facts: dict[str, Any],
) -> Ledger:
    """Open the books and say where the study stands."""
    config = place.config
    objectives = objectives_of(place.metrics, config.objectives)
    ledger = Ledger(
        parent.folder,
        objectives,
        config.budget.retries,
        parent=parent,
        store=store,
        notice=reporter.notice,
    )
    record = study_record(place, space, facts)
    with parent.exclusive():  # of two that begin a study at once, the second one resumes it
        refuse_change(parent.folder, facts, config.name)
        resumed = ledger.open(config.name, record)
    if others := parent.others():
        reporter.notice(f"another process runs this study too: joined {', '.join(others)}")
    reporter.started(Study(parent.folder), resumed, ledger.judged, config.budget.trials)
    return ledger


def study_record(place: Workplace, space: Space, facts: dict[str, Any]) -> dict[str, Any]:
    """What `study.json` says of a study, but for its name and storage.

    Args:
        facts: its `identity`.
    """
    config, loaded = place.config, place.builder.plugins.loaded
    return {
        "description": config.description,
        **study_facts(objectives_of(place.metrics, config.objectives), place.metrics),
        "config": config.to_dict(),
        "fingerprint": space.fingerprint,
        "identity": facts,
        "plugins": {name: plugin.to_dict() for name, plugin in loaded.items()},
    }
