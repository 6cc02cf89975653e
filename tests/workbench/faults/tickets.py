"""The schedule on disk: each fault is a file that one process takes, and marks once it struck.

<folder>/queue/worker/0003.json     waits; a worker takes the first for each trial
<folder>/queue/parent/0004.json     the same for a study's process
<folder>/taken/0003@00012.json      trial 12 has it, and has not reached its place
<folder>/taken/0004@p4242.json      process 4242 has it
<folder>/fired/0003.json            it struck: which process, in which trial's folder
<folder>/asks/0003.json, acks/0003  what only the driver can do, and that it is done
"""

from __future__ import annotations

import contextlib
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

    def take(self, queue: str, holder: str) -> Fault | None:
        """The fault that a holder has already, or else the next of a queue; None without any."""
        taken = self.folder / "taken"
        for path in taken.glob(f"*@{holder}.json"):
            return self._read(path)
        for path in sorted((self.folder / "queue" / queue).iterdir()):
            mine = taken / f"{path.stem}@{holder}.json"
            with contextlib.suppress(FileNotFoundError):  # another one was quicker
                path.rename(mine)
                return self._read(mine)
        return None

    def take_for(self, trial: Path) -> Fault | None:
        """The fault of a trial, by its folder; one that ended unharmed leaves it to the next."""
        fault = self.take("worker", trial.name)
        if fault is not None:
            return fault
        for path in sorted((self.folder / "taken").glob("*@[0-9]*.json")):
            before = trial.parent / path.stem.partition("@")[2] / "trial.json"
            if before.exists() and json.loads(before.read_text())["outcome"] != "running":
                mine = path.with_name(f"{path.stem.partition('@')[0]}@{trial.name}.json")
                with contextlib.suppress(FileNotFoundError):
                    path.rename(mine)
                    return self._read(mine)
        return None

    def put_back(self, holder: str = "*") -> None:
        """Queue again what a holder took that is gone, and that did not strike."""
        for path in (self.folder / "taken").glob(f"*@{holder}.json"):
            queue = "worker" if self._read(path).in_worker else "parent"
            path.rename(self.folder / "queue" / queue / f"{path.stem.partition('@')[0]}.json")

    def left(self) -> int:
        """How many have not struck."""
        return sum(1 for name in ("queue", "taken") for _ in (self.folder / name).rglob("*.json"))

    def fire(self, fault: Fault, trial: str = "") -> None:
        """Note that a fault strikes now."""
        name = f"{fault.number:04d}"
        facts = {**dataclasses.asdict(fault), "pid": os.getpid(), "trial": trial}
        self._write("fired", f"{name}.json", facts)
        for path in (self.folder / "taken").glob(f"{name}@*.json"):
            path.unlink()

    def _read(self, path: Path) -> Fault:
        return Fault(**json.loads(path.read_text()))

    def ask(self, fault: Fault, study_process: int) -> None:
        """Have the driver do what a process cannot do to itself, and wait until it is done."""
        facts = {**dataclasses.asdict(fault), "pid": study_process}
        self._write("asks", f"{fault.number:04d}.json", facts)
        until = time.monotonic() + ANSWER
        while not (self.folder / "acks" / f"{fault.number:04d}").exists():
            assert time.monotonic() < until, "the driver did not answer"
            time.sleep(0.005)

    def asked(self) -> Iterator[tuple[Fault, int]]:
        """For the driver: what was asked for since the last time, and by which study's process."""
        for path in sorted((self.folder / "asks").glob("*.json")):
            facts = json.loads(path.read_text())
            path.unlink()
            names = [field.name for field in dataclasses.fields(Fault)]
            yield Fault(**{name: facts[name] for name in names}), facts["pid"]

    def acknowledge(self, fault: Fault) -> None:
        (self.folder / "acks" / f"{fault.number:04d}").touch()

    def fired(self) -> list[dict[str, Any]]:
        return [json.loads(p.read_text()) for p in sorted((self.folder / "fired").glob("*.json"))]

    def _write(self, folder: str, name: str, facts: dict[str, Any]) -> None:
        path = self.folder / folder / name
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(facts))
        temporary.rename(path)
