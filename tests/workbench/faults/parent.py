"""A study's process under faults: `python -m tests.workbench.faults.parent STUDY.json RUNS`.

It is `run_study` with a look at the tickets before and after each write to the books, and while a
trial is paused at a rung.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.workbench.faults.schedule import Fault
from tests.workbench.faults.tickets import Tickets
from workbench import storage
from workbench.claims import Claims
from workbench.errors import WorkbenchError
from workbench.ledger import CHECKPOINT
from workbench.rungs import CONTINUE
from workbench.scheduler import Scheduler
from workbench.study import Reporter, run_study
from workbench.study_config import StudyConfig

HASTY = 0.1  # seconds that SQLite waits by itself, so that the workbench has to


class Points:
    """The places of this process, and the fault that it shall meet next."""

    def __init__(self, tickets: Tickets) -> None:
        self.tickets = tickets
        self.fault: Fault | None = None
        self.passes = 0

    def reach(self, place: str, scheduler: Any = None, number: int = 0) -> None:
        """Strike if it is time; at points of a rung with the scheduler and the paused trial."""
        if self.fault is None:
            self.fault, self.passes = self.tickets.take("parent", f"p{os.getpid()}"), 0
        if self.fault is None or self.fault.place != place:
            return
        self.passes += 1
        if self.passes >= self.fault.after:
            fault, self.fault = self.fault, None
            if fault.kind in PAUSED:
                folder = scheduler.ledger.path(number)
                self.tickets.fire(fault, str(folder))
                PAUSED[fault.kind](scheduler, folder / CHECKPOINT)
            else:
                self.tickets.fire(fault)
                self._strike(fault)

    def _strike(self, fault: Fault) -> None:
        if fault.kind == "parent killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "storage away":
            self.tickets.ask(fault, os.getpid())
        else:
            assert fault.kind == "parent's clock jumps"
            real, jump = time.time, fault.seconds
            time.time = lambda: real() + jump


def kill_idle(scheduler: Any, checkpoint: Path) -> None:
    """End the workers that have no trial, the one among them that just paused one."""
    idle = [w.process for w in scheduler.executor._workers.values() if w.trial is None]
    assert idle
    for process in idle:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def damage(scheduler: Any, checkpoint: Path) -> None:
    """Cut a checkpoint off, as a file system may after a loss of power."""
    os.truncate(checkpoint, checkpoint.stat().st_size // 2)


PAUSED: dict[str, Callable[[Any, Path], None]] = {
    "idle worker killed": kill_idle,
    "checkpoint damaged": damage,
    "checkpoint gone": lambda scheduler, checkpoint: checkpoint.unlink(),
}


def watch(points: Points) -> None:
    """Put the places into the workbench's own functions."""

    def around(owner: Any, name: str, before: str | None, after: str | None) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            if before:
                points.reach(before)
            result = real(*arguments, **named)
            if after:
                points.reach(after)
            return result

        setattr(owner, name, watched)

    around(storage, "ask", None, "asked")
    around(storage, "tell", "telling", "told")
    around(Claims, "take", None, "claimed")
    watch_rungs(points)
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        path = Path(target)
        if path.name in ("trial.json", "study.json") or path.parent.name == "layouts":
            points.reach("writing")
        real(source, target)

    os.replace = replace  # type: ignore[assignment]
    engine = storage._engine_arguments
    hasty = {"connect_args": {"timeout": HASTY}}
    storage._engine_arguments = lambda url: (
        {**engine(url), **hasty} if url.startswith("sqlite") else engine(url)
    )


def watch_rungs(points: Points) -> None:
    """Put the places into what decides on a paused trial."""
    decide = Scheduler._decide

    def watched(scheduler: Scheduler, flight: Any) -> str:
        points.reach("paused", scheduler, flight.number)
        decision = decide(scheduler, flight)
        if decision == CONTINUE:
            points.reach("decided", scheduler, flight.number)
        return decision

    Scheduler._decide = watched  # type: ignore[method-assign]


class Loud(Reporter):
    """Tells what a run log needs."""

    def notice(self, message: str) -> None:
        print("notice:", message, flush=True)

    def trial_finished(self, trial: Any) -> None:
        print(trial.number, trial.outcome, trial.reason, flush=True)


def main() -> None:
    config = StudyConfig.from_dict(json.loads(Path(sys.argv[1]).read_text()))
    watch(Points(Tickets.from_environment()))
    try:
        run_study(config, sys.argv[2], Loud())
    except WorkbenchError as error:
        print("stopped:", error, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
