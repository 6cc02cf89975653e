"""What must not change while a study goes on, or its figures would not compare."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from workbench import kernels
from workbench.builder import Builder
from workbench.environment import device_name, package_versions
from workbench.errors import WorkbenchError
from workbench.layout import Layout
from workbench.provenance import Provenance
from workbench.records import Study
from workbench.registry import Registry
from workbench.space import NONE, Space
from workbench.study_config import RungsConfig, StudyConfig
from workbench.trial import Workplace


def identity(place: Workplace, space: Space) -> dict[str, Any]:
    """JSON facts that a resumed study must share with the one that was started.

    Everything that its figures depend on: the space, what is judged and how, the data's content,
    the training, the seed, the plugins used, torch, the device, its kernels, and the threads.

    Raises:
        WorkbenchError: a setting demands kernels that do not work here.
    """
    config = place.config.to_dict()
    measured = any(metric.stage == "measured" for metric in place.metrics.values())
    return {
        "space": space.to_dict(),
        **{name: config[name] for name in ("objectives", "constraints", "metrics", "data", "seed")},
        "training": dataclasses.asdict(place.training),
        "rungs": config["rungs"],
        "data_facts": place.data.describe(),
        "plugins": used_plugins(place.config, place.builder),
        "torch": package_versions(("torch",))["torch"],
        "threads": place.threads,
        "device": device_name(place.device) if measured else place.device,
        "backends": used_backends(place),
    }


def used_backends(place: Workplace) -> dict[str, list[str]]:
    """`kernels.in_use` of workbench's own operations and those of plugins that the study uses."""
    used = used_plugins(place.config, place.builder)
    loaded = place.builder.plugins.loaded
    packages = {loaded[name].module.partition(".")[0] for name in used if name in loaded}
    return kernels.in_use(place.device, packages | {"workbench"})


def used_plugins(config: StudyConfig, builder: Builder) -> dict[str, str]:
    """Version and sources, as `str(Provenance)` gives them, of every plugin that the study uses.

    That is, every plugin that it names something of, and those whose code these import.
    """
    registries = builder.registries()
    used = {
        registries[kind].provenance(name).plugin
        for kind, names in _named(config).items()
        for name in names
        if name != NONE
    }
    loaded = builder.plugins.loaded
    waiting = sorted(used & loaded.keys())
    while waiting:
        found = _imported(loaded[waiting.pop()], loaded) - used
        used |= found
        waiting += sorted(found)
    origins = {
        origin.plugin: origin for registry in registries.values() for origin in _origins(registry)
    }
    return {name: str(loaded.get(name) or origins[name]) for name in sorted(used)}


def _named(config: StudyConfig) -> dict[str, tuple[str, ...]]:
    """The names that a study gives, by kind."""
    space = config.space
    return {
        "layers": (*space.mixers, *space.mlps),
        "placements": space.placements,
        "quantizers": space.quantizers,
        "metrics": config.metric_names,
        "data_sources": (config.data["source"],),
    }


def _origins(registry: Registry[Any]) -> list[Provenance]:
    return [registry.provenance(name) for name in registry]


def _imported(plugin: Provenance, loaded: Mapping[str, Provenance]) -> set[str]:
    """Plugins whose functions, classes or modules a plugin's modules hold."""
    top = plugin.module.partition(".")[0]
    values = [
        value
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == top and isinstance(module, ModuleType)
        for value in list(vars(module).values())
    ]
    homes = {
        value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        for value in values
        if isinstance(value, ModuleType | FunctionType | type)
    }
    tops = {home.partition(".")[0] for home in homes if isinstance(home, str)} - {top}
    return {name for name, other in loaded.items() if other.module.partition(".")[0] in tops}


def trial_provenance(
    config: StudyConfig, builder: Builder, layout: Layout, placement: str
) -> dict[str, dict[str, dict[str, str | None]]]:
    """Where everything that makes up one trial comes from: kind → name → provenance.

    Without files: records are shared.
    """
    quantizers = {block.quantizer.name for block in layout.blocks if block.quantizer is not None}
    used = {
        **_named(config),
        "layers": {block.layer for block in layout.blocks},
        "placements": {placement},
        "quantizers": quantizers,
    }
    registries = builder.registries()
    return {
        kind: {name: registries[kind].provenance(name).public() for name in sorted(names)}
        for kind, names in used.items()
    }


def refuse_change(folder: Path, now: dict[str, Any], name: str) -> None:
    """Compare with the study that `folder` holds, if it holds one.

    Raises:
        WorkbenchError: they differ; lists what and says what to do.
    """
    if not (folder / "study.json").exists():
        return
    # A study from before there were other kernels, or rungs, had none.
    rungs = dataclasses.asdict(RungsConfig())
    before = {"backends": {}, "rungs": rungs, **Study(folder).data.get("identity", {})}
    changes = list(differences(before, now))
    if changes:
        shown = "\n".join(f"  {change}" for change in changes[:8])
        way_back = (
            "put the old values back to resume (a plugin's: install the version that it was, or "
            "check out the sources that had that sha256)"
            if any(change.startswith("plugins.") for change in changes)
            else "put the old values back to resume"
        )
        raise WorkbenchError(
            f"study {name!r} in {folder} was started differently:\n{shown}\n"
            "Its trials would not compare with new ones. Give the study another name to start a "
            f"new one, or {way_back}."
        )


def differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    """What differs between two pieces of JSON data, as `training.lr: 1 then, 2 now`."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            inner = f"{where}.{key}" if where else str(key)
            yield from differences(before.get(key), now.get(key), inner)
    elif _plain(before) != _plain(now):
        yield f"{where}: {before!r} then, {now!r} now"


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
