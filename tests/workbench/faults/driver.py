"""Runs a study under a schedule of faults: two processes, each started again whenever it died."""

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
PARENTS = 2  # processes on the study: one goes on while another is killed and started again
MARK = "WORKBENCH_FAULTS_PARENT"  # tells which of them a process belongs to
SPARE = 8  # trials of the budget beyond what the faults in workers use up
MORE = 8  # trials added at the end, as long as there are faults that met no trial
SETTLING = 10.0  # seconds that processes whose parent was killed may take to end
LIMIT = 900.0  # seconds for a whole study
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
    "rungs": {"at": [0.5], "min_peers": 4, "margin": 0.02},
    "budget": {"trials": 1, "trial_timeout": 8.0, "retries": 4},
    "runtime": {"device": "cpu", "executor": "process", "workers": 1, "threads": 1},
    "plugin_dirs": [str(Path(__file__).parent / "injector")],
}  # fmt: skip


@dataclasses.dataclass
class Campaign:
    """What a study went through.

    Attributes:
        fired: the faults that struck, as their tickets say.
        starts: of the study's processes.
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
    away = Away(campaign.study / "optuna.db", server)
    began = time.monotonic()
    while True:
        config = {**STUDY, "seed": seed, "budget": {**STUDY["budget"], "trials": campaign.budget}}
        (folder / "study.json").write_text(json.dumps(config))
        _Parents(folder, tickets, campaign, disk, away, began + LIMIT).run()
        tickets.put_back()
        if not tickets.left():
            break
        campaign.budget += MORE
    away.wait()
    campaign.seconds = time.monotonic() - began
    campaign.fired = tickets.fired()
    return campaign


@dataclasses.dataclass
class _Parents:
    """The study's processes, each started again until it has seen the study's end.

    Attributes:
        until: when all must be over, on `time.monotonic`.
        full: whether the disk was filled at any time: several processes may stop for it.
    """

    folder: Path
    tickets: Tickets
    campaign: Campaign
    disk: SmallDisk | LimitedFiles
    away: Away
    until: float
    full: bool = False

    def run(self) -> None:
        """Serve them until all are done.

        Raises:
            AssertionError: one ended as no fault explains, or never.
        """
        running = dict(self._start() for _ in range(PARENTS))
        try:
            while running:
                assert time.monotonic() < self.until, "the study does not come to its end"
                self._serve()
                for process in [one for one in running if one.poll() is not None]:
                    if not self._is_done(process, running.pop(process)):
                        running.update([self._start()])
                time.sleep(0.01)
        finally:
            for process in running:
                process.kill()
                process.wait()
            self.disk.clear()

    def _start(self) -> tuple[subprocess.Popen[bytes], int]:
        self.campaign.starts += 1
        number = self.campaign.starts
        environment = {
            **os.environ,
            FOLDER: str(self.tickets.folder),
            MARK: str(number),
            "PYTHONPATH": str(ROOT),
        }
        environment.pop(ENVIRONMENT, None)
        if self.campaign.url is not None:
            environment[ENVIRONMENT] = self.campaign.url
        runs = str(self.campaign.runs)
        command = [sys.executable, "-m", f"{__package__}.parent", "study.json", runs]
        with self._log(number).open("w") as out:
            process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=out, stderr=out
            )
        return process, number

    def _log(self, number: int) -> Path:
        return self.folder / f"log-{number:03d}.txt"

    def _serve(self) -> None:
        """Do what faults ask for."""
        for fault, process in self.tickets.asked():
            if fault.kind == "disk full":
                self.full = True
                self.disk.fill(process)
            else:
                self.away.begin(fault.seconds)
            self.tickets.acknowledge(fault)

    def _is_done(self, process: subprocess.Popen[bytes], number: int) -> bool:
        """Whether a process that ended has seen the study's end."""
        words = self._log(number).read_text()
        self.campaign.log += words
        self.campaign.orphans += settled(MARK, str(number))
        self.tickets.put_back(f"p{process.pid}")
        if process.returncode == 1 and self.full:
            self.disk.clear()
            return False
        assert process.returncode in (0, -9), words
        return process.returncode == 0


def settled(name: str, value: str) -> list[int]:
    """Marked processes that are there although none should be, after a while; ended then."""
    until = time.monotonic() + SETTLING
    while (left := list(marked(name, value))) and time.monotonic() < until:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, 9)
    return left


def marked(name: str, value: str) -> Iterator[int]:
    """Processes whose environment has a variable with a value."""
    wanted = f"{name}={value}".encode()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (path / "environ").read_bytes().split(b"\0"):
                yield int(path.name)
        except OSError:  # it ended, or is another user's
            continue
