"""Runs a study under a schedule of faults, starting it again whenever its process died."""

from __future__ import annotations

import dataclasses
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.workbench.faults.disk import LimitedFiles, SmallDisk
from tests.workbench.faults.schedule import Fault, needed
from tests.workbench.faults.tickets import FOLDER, Tickets
from workbench.storage_url import ENVIRONMENT

ROOT = Path(__file__).parents[3]
NAME = "faults"
SPARE = 8  # trials of the budget beyond what the faults in workers use up
SETTLING = 10.0  # seconds that processes whose parent was killed may take to end
LIMIT = 600.0  # seconds for a whole study
STUDY: dict[str, Any] = {
    "name": NAME,
    "objectives": ["loss", "weights"],
    "report": ["measured", "trained"],
    "space": {
        "d_model": {"low": 4, "high": 64, "step": 4},
        "num_layers": {"low": 1, "high": 4},
        "mixers": ["faulty", "wide"],
        "placements": ["alternate"],
        "layers": {"faulty": {"width": "search"}, "wide": {"width": "search"}},
    },
    "data": {"source": "counting"},
    "training": {
        "tokens": 512, "batch_size": 4, "seq_len": 16, "lr": 0.01, "checkpoint_seconds": 1e-6
    },
    "budget": {"trials": 1, "trial_timeout": 8.0, "retries": 4},
    "runtime": {"device": "cpu", "executor": "process", "workers": 2, "threads": 1},
    "plugin_dirs": [str(Path(__file__).parent / "injector")],
}  # fmt: skip


@dataclasses.dataclass
class Campaign:
    """What a study went through.

    Attributes:
        fired: the faults that struck, as their tickets say.
        starts: of the study's process.
        orphans: processes that outlived the one that started them.
        log: what the study's processes printed.
    """

    runs: Path
    url: str | None
    budget: int
    faults: list[Fault]
    fired: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    starts: int = 0
    seconds: float = 0.0
    orphans: list[int] = dataclasses.field(default_factory=list)
    log: str = ""

    @property
    def study(self) -> Path:
        return self.runs / NAME


class Away:
    """Takes the storage away for a while."""

    def __init__(self, database: Path, server: Any = None) -> None:
        self.database, self.server = database, server
        self._one = threading.Lock()

    def begin(self, seconds: float) -> None:
        """The storage is away when this returns, and comes back by itself."""
        self._one.acquire()
        if self.server is not None:
            self.server.stop()
            back = self.server.start
        else:
            connection = sqlite3.connect(self.database, timeout=30, check_same_thread=False)
            connection.execute("BEGIN EXCLUSIVE")

            def back() -> None:
                connection.rollback()
                connection.close()

        def end() -> None:
            time.sleep(seconds)
            back()
            self._one.release()

        threading.Thread(target=end).start()

    def wait(self) -> None:
        """Until it is back."""
        with self._one:
            pass


def run_campaign(
    folder: Path,
    faults: list[Fault],
    disk: SmallDisk | LimitedFiles,
    *,
    seed: int = 0,
    url: str | None = None,
    server: Any = None,
) -> Campaign:
    """Run a study to its end under all faults.

    Args:
        folder: for tickets and logs; not on the disk that will be full.
        disk: the study's runs folder is on it.
        url, server: PostgreSQL, and how to stop and start it; None for SQLite.

    Raises:
        AssertionError: the study's process ended as no fault explains, or never.
    """
    tickets = Tickets(folder / "tickets")
    tickets.lay_out(faults)
    campaign = Campaign(disk.folder / "runs", url, needed(faults) + SPARE, faults)
    config = {**STUDY, "seed": seed, "budget": {**STUDY["budget"], "trials": campaign.budget}}
    (folder / "study.json").write_text(json.dumps(config))
    away = Away(campaign.study / "optuna.db", server)
    began = time.monotonic()
    finished = False
    while not finished:
        assert time.monotonic() - began < LIMIT, "the study does not come to its end"
        finished = _one_start(folder, tickets, campaign, disk, away)
    away.wait()
    campaign.seconds = time.monotonic() - began
    campaign.fired = tickets.fired()
    return campaign


def _one_start(
    folder: Path, tickets: Tickets, campaign: Campaign, disk: SmallDisk | LimitedFiles, away: Away
) -> bool:
    """Start the study's process and serve it until it ends; True once the study is finished."""
    tickets.put_back()
    campaign.starts += 1
    environment = {**os.environ, FOLDER: str(tickets.folder), "PYTHONPATH": str(ROOT)}
    environment.pop(ENVIRONMENT, None)
    if campaign.url is not None:
        environment[ENVIRONMENT] = campaign.url
    command = [sys.executable, "-m", f"{__package__}.parent", "study.json", str(campaign.runs)]
    log = folder / f"log-{campaign.starts:03d}.txt"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out)
        try:
            full = _serve(process, tickets, disk, away)
        finally:
            process.kill()
            process.wait()
            disk.clear()
    campaign.log += log.read_text()
    campaign.orphans += settled(tickets.folder)
    stopped = full and process.returncode == 1
    assert process.returncode in (0, -9) or stopped, log.read_text()
    return process.returncode == 0


def _serve(
    process: subprocess.Popen[bytes],
    tickets: Tickets,
    disk: SmallDisk | LimitedFiles,
    away: Away,
) -> bool:
    """Do what faults ask for until the process ends; whether the disk was full."""
    full = False
    until = time.monotonic() + LIMIT
    while process.poll() is None:
        assert time.monotonic() < until, "the study's process does not end"
        for fault in tickets.asked():
            if fault.kind == "disk full":
                full = True
                disk.fill(process.pid)
            else:
                away.begin(fault.seconds)
            tickets.acknowledge(fault)
        time.sleep(0.01)
    return full


def settled(marker: Path) -> list[int]:
    """Processes of a study that are there although none should be, after a while; ended then."""
    until = time.monotonic() + SETTLING
    while (left := list(marked(marker))) and time.monotonic() < until:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, 9)
    return left


def marked(marker: Path) -> Iterator[int]:
    """Processes whose environment names a folder of tickets."""
    wanted = f"{FOLDER}={marker}".encode()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (path / "environ").read_bytes().split(b"\0"):
                yield int(path.name)
        except OSError:  # it ended, or is another user's
            continue
