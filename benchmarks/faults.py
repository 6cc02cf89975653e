"""A study under faults, by kind, beside plain Optuna under those that it can meet.

    python benchmarks/faults.py [--seed 0] [--without-optuna]

The schedule, the toy plugin and the accounts are those of tests/workbench/faults. Ours: two
processes on one study on SQLite, with a worker each and a rung; one of the outages of its storage
takes a minute. A fault is survived if its trial is on record as what it was, or runs again where
the fault was not its layout's doing, and the study reaches its budget.

Optuna: two processes on one study, with heartbeats, `RetryHeartbeatStaleTrialCallback` and
`catch=(Exception,)`, on the faults of the same schedule that strike in a trial, but for those at
rungs, which it does not have. Whoever dies is started again by us: Optuna starts nothing. Nor has
it an answer to a hang: after ten seconds we kill the process, and the hang counts as not survived.
`parent killed` kills both processes. Any other fault is survived if its trial ended as FAIL and,
for a killed process, its parameters were queued again. A NaN of a metric that is no objective goes
unnoticed there, and is not survived (five in the schedule of seed 0). Lost: trials that a killed
process had and that were never queued again, those that still wait, and those that the storage
takes for running after the end. Duplicated: layouts that were trained to the end more than once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import optuna  # noqa: E402
from optuna.trial import FrozenTrial, TrialState  # noqa: E402

from tests.workbench.faults.accounts import account, best_again, survived  # noqa: E402
from tests.workbench.faults.disk import small_disk  # noqa: E402
from tests.workbench.faults.driver import STUDY, run_campaign, settled  # noqa: E402
from tests.workbench.faults.schedule import Fault, draw  # noqa: E402
from tests.workbench.faults.test_faults import COUNTS  # noqa: E402
from tests.workbench.faults.tickets import FOLDER, Tickets  # noqa: E402
from workbench.environment import processor_name  # noqa: E402

SHARED = (
    "worker killed", "worker exits", "sys.exit", "hang", "out of memory", "NaN", "plugin raises",
    "parent killed",
)  # fmt: skip
PROCESSES = 2
HANGING = 10.0  # seconds after which we end what hangs for Optuna
LIMIT = 900.0
MINUTE = 60.0
COMPLETE = 8  # trials that Optuna's study has to bring to their end, beside those that meet faults
Table = dict[str, tuple[int, int]]


def ours(folder: Path, seed: int) -> tuple[Table, str]:
    """Faults and survivals by kind, and a line on the whole."""
    faults = draw(seed, COUNTS)
    outage = next(fault for fault in faults if fault.kind == "storage away")
    faults[outage.number] = dataclasses.replace(outage, seconds=MINUTE)
    with small_disk(folder / "disk") as disk:
        campaign = run_campaign(folder, faults, disk)
        accounts = account(campaign)
        on_record, again = best_again(campaign)
    for line in accounts.wrong:
        print(line, file=sys.stderr)
    words = (
        f"ours: {len(accounts.lost)} lost, {len(accounts.duplicated)} duplicated, "
        f"{len(accounts.disagreeing)} disagreeing, {len(accounts.stray)} stray files, "
        f"{len(campaign.orphans)} orphan processes, {campaign.starts} starts, "
        f"best weights {'reproduce' if abs(on_record - again) < 1e-6 else 'DO NOT reproduce'} "
        f"their loss, {campaign.seconds:.0f} s"
    )
    return survived(campaign, accounts), words


class Peers:
    """Optuna's processes, started again whenever one ended before the study did."""

    def __init__(self, folder: Path, tickets: Tickets, url: str) -> None:
        self.folder, self.tickets = folder, tickets
        command = [sys.executable, "-m", "tests.workbench.faults.optuna_peer", "study.json", url]
        environment = {**os.environ, FOLDER: str(tickets.folder), "PYTHONPATH": str(ROOT)}
        self._options: dict[str, Any] = {"cwd": folder, "env": environment}
        self._command = command
        self.running: list[subprocess.Popen[bytes]] = []
        self.starts = 0
        self.done = False

    def serve(self) -> None:
        """Until a process ends by itself, and those beside it."""
        self.first = time.monotonic()
        hung: dict[int, float] = {}
        while not self.done or self.running:
            assert time.monotonic() - self.first < LIMIT, "Optuna's study does not end"
            self._restart()
            for _ in self.tickets.asked():
                self._kill_all()
            for facts in self.tickets.fired():
                if facts["kind"] == "hang":
                    since = hung.setdefault(facts["pid"], time.monotonic())
                    if time.monotonic() - since > HANGING:
                        self._kill(facts["pid"])
            time.sleep(0.05)

    def _restart(self) -> None:
        for process in list(self.running):
            if process.poll() is not None:
                self.running.remove(process)
                self.done = self.done or self._is_enough()
        while not self.done and len(self.running) < PROCESSES:
            with (self.folder / "log.txt").open("a") as log:
                self.running.append(
                    subprocess.Popen(self._command, stdout=log, stderr=log, **self._options)
                )
            self.starts += 1

    def _is_enough(self) -> bool:
        complete = [t for t in trials_of(self._command[-1]) if t.state == TrialState.COMPLETE]
        return len(complete) >= COMPLETE

    def _kill(self, pid: int) -> None:
        for process in self.running:
            if process.pid == pid:
                process.kill()

    def _kill_all(self) -> None:
        for process in self.running:
            process.kill()


def trials_of(url: str) -> list[FrozenTrial]:
    with contextlib.suppress(KeyError):  # nobody came so far as to make it
        return optuna.load_study(study_name=STUDY["name"], storage=url).get_trials()
    return []


def theirs(folder: Path, seed: int) -> tuple[Table, str]:
    """The same of plain Optuna."""
    drawn = draw(seed, COUNTS)
    faults = [f for f in drawn if f.in_worker and f.kind in SHARED and f.place != "rung"]
    tickets = Tickets(folder / "tickets")
    tickets.lay_out(faults)
    config = {**STUDY, "seed": seed, "budget": {**STUDY["budget"], "trials": COMPLETE}}
    (folder / "study.json").write_text(json.dumps(config))
    url = f"sqlite:///{folder / 'optuna.db'}"
    peers = Peers(folder, tickets, url)
    began = time.monotonic()
    try:
        peers.serve()
    finally:
        settled(FOLDER, str(tickets.folder))
    seconds = time.monotonic() - began
    trials = trials_of(url)
    again = {t.system_attrs.get("failed_trial") for t in trials} | {
        number for t in trials for number in t.system_attrs.get("retry_history", [])
    }
    running = {t.number for t in trials if t.state == TrialState.RUNNING}
    waiting = sum(t.state == TrialState.WAITING for t in trials)
    struck = {facts["number"]: int(Path(facts["trial"]).name) for facts in tickets.fired()}
    table = _by_kind(faults, struck, trials, again)
    killed = {struck[f.number] for f in faults if _is_kill(f) and f.number in struck}
    layouts = Counter(t.user_attrs["layout"] for t in trials if t.state == TrialState.COMPLETE)
    twice = sum(count - 1 for count in layouts.values())
    words = (
        f"Optuna: {len((killed - again) | running) + waiting} lost, {twice} duplicated, "
        f"{peers.starts} starts, {seconds:.0f} s"
    )
    return table, words


def _is_kill(fault: Fault) -> bool:
    return fault.kind in ("worker killed", "worker exits", "sys.exit", "hang", "parent killed")


def _by_kind(
    faults: list[Fault], struck: dict[int, int], trials: list[FrozenTrial], again: set[Any]
) -> Table:
    table: Table = {}
    for fault in faults:
        if fault.number not in struck:
            continue
        number = struck[fault.number]
        well = trials[number].state == TrialState.FAIL and fault.kind != "hang"
        if _is_kill(fault):
            well = well and number in again
        planted, good = table.get(fault.kind, (0, 0))
        table[fault.kind] = planted + 1, good + well
    return table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without-optuna", action="store_true")
    arguments = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        mine, line = ours(Path(folder), arguments.seed)
        lines.append(line)
    peer: Table = {}
    if not arguments.without_optuna:
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            peer, line = theirs(Path(folder), arguments.seed)
            lines.append(line)
    print(f"{processor_name()}, optuna {optuna.__version__}, {datetime.now(UTC):%Y-%m-%d}\n")
    print("| fault | ours: struck | survived | Optuna: struck | survived |\n|---|--:|--:|--:|--:|")
    for kind in COUNTS:
        theirs_ = " | ".join(map(str, peer[kind])) if kind in peer else "– | –"
        print(f"| {kind} | {mine[kind][0]} | {mine[kind][1]} | {theirs_} |")
    total = [sum(column) for column in zip(*mine.values(), strict=True)]
    other = [sum(column) for column in zip(*(peer.values() or [(0, 0)]), strict=True)]
    print(f"| all | {total[0]} | {total[1]} | {other[0]} | {other[1]} |\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
