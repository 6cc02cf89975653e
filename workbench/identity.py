"""What must not change while a study goes on, or its figures would not compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workbench.builder import Builder
from workbench.environment import device_name, package_versions
from workbench.errors import WorkbenchError
from workbench.records import Study
from workbench.space import NONE, Space
from workbench.study_config import StudyConfig
from workbench.trial import Workplace


def identity(place: Workplace, space: Space) -> dict[str, Any]:
    """JSON facts that a resumed study must share with the one that was started.

    Everything that its figures depend on: the space, what is judged and how, the data's content,
    the training, the seed, the plugins used, torch, and the device and threads.
    """
    config = place.config.to_dict()
    measured = any(metric.stage == "measured" for metric in place.metrics.values())
    return {
        "space": space.to_dict(),
        **{name: config[name] for name in ("objectives", "constraints", "metrics", "data", "seed")},
        "training": dataclasses.asdict(place.training),
        "data_facts": place.data.describe(),
        "plugins": used_plugins(place.config, place.builder),
        "torch": package_versions(("torch",))["torch"],
        "threads": place.threads,
        "device": device_name(place.device) if measured else place.device,
    }


def used_plugins(config: StudyConfig, builder: Builder) -> dict[str, str]:
    """`package version`, or the content hash of a single file, of every plugin the study names."""
    space = config.space
    named = {
        "layers": (*space.mixers, *space.mlps),
        "placements": space.placements,
        "quantizers": space.quantizers,
        "metrics": config.metric_names,
        "data_sources": (config.data["source"],),
    }
    registries = builder.registries()
    found = {}
    for kind, names in named.items():
        for name in names:
            if name != NONE:
                source = registries[kind].provenance(name)
                found[source.plugin] = f"{source.package or source.plugin} {source.version}"
    return dict(sorted(found.items()))


def refuse_change(folder: Path, now: dict[str, Any], name: str) -> None:
    """Compare with the study that `folder` holds, if it holds one.

    Raises:
        WorkbenchError: they differ; lists what and says what to do.
    """
    if not (folder / "study.json").exists():
        return
    changes = list(_differences(Study(folder).data.get("identity", {}), now))
    if changes:
        shown = "\n".join(f"  {change}" for change in changes[:8])
        raise WorkbenchError(
            f"study {name!r} in {folder} was started differently:\n{shown}\n"
            "Its trials would not compare with new ones. Give the study another name to start a "
            "new one, or put the old values back to resume."
        )


def _differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            inner = f"{where}.{key}" if where else str(key)
            yield from _differences(before.get(key), now.get(key), inner)
    elif _plain(before) != _plain(now):
        yield f"{where}: {before!r} then, {now!r} now"


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
