"""Measured seconds of single layers, on disk: what `latency.LatencyModel` adds up.

One JSON file a machine (device, versions, dtype, timer): an entry a part of layouts and load, and
whole models measured beside them, to fit and to check a model with. Written whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from workbench.errors import WorkbenchError
from workbench.files import read_json, write_json
from workbench.latency_machine import Load, Machine
from workbench.latency_parts import Part
from workbench.layout import Layout, canonical_json

SCHEMA = 1
Role = Literal["fit", "check"]


def latency_folder(cache_dir: Path) -> Path:
    """Where a study's cache keeps tables and ceilings."""
    return cache_dir / "latency"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One part under one load.

    Attributes:
        seconds: of one copy, the least disturbed (`latency_filling` says how).
        spread: of the rounds, slowest less fastest, relative to the figure.
        sources: versions and digests of the code that was measured.
    """

    seconds: float
    spread: float
    sources: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observation:
    """A whole model, measured.

    Attributes:
        layout: resolved.
        seconds, spread: as in Entry, of the whole.
        role: whether a model is fitted to it or checked against it, never both.
        sources: as in Entry, of all its parts.
    """

    layout: Layout
    load: Load
    seconds: float
    spread: float
    role: Role
    sources: str


class LatencyTable:
    """The figures of one machine.

    Args:
        machine: where they were, or will be, measured.
        path: where `save` writes; None keeps them in memory.
        strict: an entry counts only for the very code that it was measured on. A record that is
            read for its figures' own sake need not be.

    Attributes:
        entries: by part and load; `put` adds to them.
        observations: whole models.
        version: rises with every entry.
    """

    def __init__(self, machine: Machine, path: Path | None = None, *, strict: bool = True) -> None:
        self.machine = machine
        self.path = path
        self.strict = strict
        self.entries: dict[tuple[Part, Load], Entry] = {}
        self.observations: list[Observation] = []
        self.version = 0

    @classmethod
    def open(cls, folder: Path, machine: Machine, *, must_exist: bool = False) -> LatencyTable:
        """The machine's table in a cache folder; a new one where there is none.

        Raises:
            WorkbenchError: there is none and it must exist, it cannot be read, or it is another
                machine's.
        """
        path = folder / f"{machine.slug}.json"
        if path.exists():
            table = cls.read(path)
            machine.require(table.machine, str(path))
            return table
        if must_exist:
            raise WorkbenchError(
                f"there is no latency table of {machine.device_name} ({machine.dtype}, "
                f"{machine.timer}) at {path}: run `workbench latency STUDY.toml` first."
            )
        return cls(machine, path)

    @classmethod
    def read(cls, path: Path, *, strict: bool = True) -> LatencyTable:
        """The table in a file, whatever the machine.

        Raises:
            WorkbenchError: it cannot be read, or is of another schema; names the file.
        """
        data = read_json(path)
        version = data.get("schema") if isinstance(data, dict) else None
        if version != SCHEMA:
            raise WorkbenchError(
                f"{path} is of schema {version!r}, and this workbench reads {SCHEMA}: delete it "
                "and run `workbench latency STUDY.toml`."
            )
        try:
            table = cls(Machine.from_dict(data["machine"]), path, strict=strict)
            table._take(data)
        except (KeyError, TypeError, ValueError, IndexError, WorkbenchError) as error:
            what = str(error) if isinstance(error, WorkbenchError) else repr(error)
            raise WorkbenchError(f"{path} is damaged: {what}. Delete it.") from None
        return table

    def _take(self, data: Mapping[str, Any]) -> None:
        for row in data["entries"]:
            entry = Entry(
                seconds=_positive(row["seconds"]), spread=row["spread"], sources=row["sources"]
            )
            self.put(canonical_json(row["part"]), _load(row), entry)
        blocks = data["blocks"]
        for row in data["observations"]:
            layout = {**row["layout"], "blocks": [blocks[i] for i in row["layout"]["blocks"]]}
            self.observations.append(
                Observation(
                    layout=Layout.from_dict(layout),
                    load=_load(row),
                    seconds=_positive(row["seconds"]),
                    spread=row["spread"],
                    role=row["role"],
                    sources=row["sources"],
                )
            )

    def save(self) -> None:
        """Write the table to its path, if it has one.

        Raises:
            DiskError: it cannot be written; the old one stays.
        """
        if self.path is not None:
            write_json(self.path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """JSON data; each block that observations name is there once."""
        blocks: dict[str, int] = {}
        observations = [
            {
                "layout": {
                    **seen.layout.to_dict(),
                    "blocks": [
                        blocks.setdefault(canonical_json(block.to_dict()), len(blocks))
                        for block in seen.layout.blocks
                    ],
                },
                **dataclasses.asdict(seen.load),
                "seconds": seen.seconds,
                "spread": seen.spread,
                "role": seen.role,
                "sources": seen.sources,
            }
            for seen in self.observations
        ]
        return {
            "schema": SCHEMA,
            "machine": self.machine.to_dict(),
            "entries": [
                {"part": json.loads(part), **dataclasses.asdict(load), **dataclasses.asdict(entry)}
                for (part, load), entry in self.entries.items()
            ],
            "blocks": [json.loads(block) for block in blocks],
            "observations": observations,
        }

    def put(self, part: Part, load: Load, entry: Entry) -> None:
        """Take in an entry, in place of an older one."""
        self.entries[part, load] = entry
        self.version += 1

    def find(self, part: Part, load: Load, sources: str) -> Entry | None:
        """The entry of a part as its code is now; None for none."""
        entry = self.entries.get((part, load))
        return entry if entry is not None and self.current(entry.sources, sources) else None

    def current(self, then: str, now: str) -> bool:
        """Whether a figure of the code `then` counts for the code `now`."""
        return then == now or not self.strict


def _load(row: Mapping[str, Any]) -> Load:
    return Load(phase=row["phase"], batch_size=row["batch_size"], length=row["length"])


def _positive(value: Any) -> float:
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{value!r} are no seconds")
    return number
