"""The schedule on disk: each fault is a file that one process takes, and marks once it struck.

<folder>/queue/worker/0003.json     waits; a worker takes the first for each trial
<folder>/queue/parent/0004.json     the same for the study's process
<folder>/taken/0003.json            a trial has it, and has not reached its place
<folder>/fired/0003.json            it struck: which process, in which trial's folder
<folder>/asks/0003.json, acks/0003  what only the driver can do, and that it is done
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.workbench.faults.schedule import Fault

FOLDER = "WORKBENCH_FAULTS"  # the variable with the tickets' folder; marks every process, too
ANSWER = 60.0  # seconds that the driver may take


class Tickets:
    """The tickets in a folder; every process has its own object."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def from_environment(cls) -> Tickets:
        return cls(Path(os.environ[FOLDER]))

    def lay_out(self, faults: list[Fault]) -> None:
        for name in ("queue/worker", "queue/parent", "taken", "fired", "asks", "acks"):
            (self.folder / name).mkdir(parents=True)
        for fault in faults:
            queue = "worker" if fault.in_worker else "parent"
            text = json.dumps(dataclasses.asdict(fault))
            (self.folder / "queue" / queue / f"{fault.number:04d}.json").write_text(text)

    def take(self, queue: str) -> Fault | None:
        """The next fault of a queue; None once it is empty."""
        for path in sorted((self.folder / "queue" / queue).iterdir()):
            mine = self.folder / "taken" / path.name
            try:
                path.rename(mine)
            except FileNotFoundError:  # another worker was quicker
                continue
            return Fault(**json.loads(mine.read_text()))
        return None

    def put_back(self) -> None:
        """Queue what was taken by processes that ended before it struck; none may run."""
        for path in (self.folder / "taken").iterdir():
            fault = Fault(**json.loads(path.read_text()))
            path.rename(
                self.folder / "queue" / ("worker" if fault.in_worker else "parent") / path.name
            )

    def fire(self, fault: Fault, trial: str = "") -> None:
        """Note that a fault strikes now."""
        name = f"{fault.number:04d}.json"
        facts = {**dataclasses.asdict(fault), "pid": os.getpid(), "trial": trial}
        self._write("fired", name, facts)
        (self.folder / "taken" / name).unlink()

    def ask(self, fault: Fault, study_process: int) -> None:
        """Have the driver do what a process cannot do to itself, and wait until it is done."""
        facts = {**dataclasses.asdict(fault), "pid": study_process}
        self._write("asks", f"{fault.number:04d}.json", facts)
        until = time.monotonic() + ANSWER
        while not (self.folder / "acks" / f"{fault.number:04d}").exists():
            assert time.monotonic() < until, "the driver did not answer"
            time.sleep(0.005)

    def asked(self) -> Iterator[Fault]:
        """For the driver: what was asked for since the last time."""
        for path in sorted((self.folder / "asks").glob("*.json")):
            facts = json.loads(path.read_text())
            path.unlink()
            yield Fault(**{f.name: facts[f.name] for f in dataclasses.fields(Fault)})

    def acknowledge(self, fault: Fault) -> None:
        (self.folder / "acks" / f"{fault.number:04d}").touch()

    def fired(self) -> list[dict[str, Any]]:
        return [json.loads(p.read_text()) for p in sorted((self.folder / "fired").glob("*.json"))]

    def _write(self, folder: str, name: str, facts: dict[str, Any]) -> None:
        path = self.folder / folder / name
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(facts))
        temporary.rename(path)
