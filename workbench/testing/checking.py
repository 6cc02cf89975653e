"""Runs the contract suites on a package, in processes that its code may end."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from workbench.discovery import DISABLE, GROUP
from workbench.errors import WorkbenchError
from workbench.storage_url import public_environment
from workbench.testing import ends
from workbench.testing.blame import own_frames
from workbench.testing.check_process import Job
from workbench.testing.selecting import refuse_malformed, selects_nothing
from workbench.testing.subject import Check, Subject, is_meant
from workbench.testing.watching import ERRORS, End, Watched

LOADING = 300.0  # seconds to import torch and every plugin, and to collect the tests
# Seconds that a thing's checks may take to end processes, or hang, in all; after that, those that
# have a member in common with such a check are not run.
PATIENCE = 120.0
TESTS_FAILED, NOTHING_COLLECTED = 1, 5  # exit statuses of pytest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What was checked, and every check of every thing; what failed to load comes first."""

    subject: Subject
    checks: tuple[Check, ...]


def check_package(
    package: str,
    *,
    plugin_dirs: Sequence[str] = (),
    tests: Sequence[Path] = (),
    only: str | None = None,
    timeout: float,
) -> Report:
    """Check all that a package registers. None of its code runs in this process.

    A check that ends its process, or takes too long, has failed; the others run in a new one.

    Args:
        package: name of a distribution or plugin; a plugin file's is its stem.
        plugin_dirs: folders whose files are plugins, too; absolute.
        tests: files whose contract suites go before the derived ones; those beside the plugins'
            modules if empty.
        only: pytest's `-k`: part of a name of a check or a thing, with `and`, `or`, `not`.
        timeout: seconds a check.

    Raises:
        WorkbenchError: nothing has that name, pytest is not installed, `only` is no expression or
            selects nothing, or pytest ended badly.
    """
    if only is not None:
        refuse_malformed(only)
    if importlib.util.find_spec("pytest") is None:
        raise WorkbenchError(
            "check-plugin needs pytest, which is not installed: pip install 'lm-workbench[testing]'"
        )
    files = [str(path.resolve()) for path in tests]
    job = Job(package=package, plugin_dirs=list(plugin_dirs), tests=files, only=only)
    with tempfile.TemporaryDirectory(prefix="workbench-check-") as folder:
        session = _Session(job, timeout, Path(folder))
        session.run()
    return session.report()


class _Session:
    """One process after another, until everything has an outcome.

    Each that ends early is the last for something: a check, a thing or a plugin.
    """

    def __init__(self, job: Job, timeout: float, folder: Path) -> None:
        self.job = job
        self.timeout = timeout
        self.folder = folder
        self.subject: Subject | None = None
        self.order: dict[str, int] = {}  # of the tests, as the first process collected them
        self.outcomes: dict[str, Check] = {}  # by the test's id
        self.ends: list[dict[str, Any]] = []  # the checks that ended a process, as they began
        # Seconds by thing: those checks', and what it took to begin anew.
        self.lost: defaultdict[str, float] = defaultdict(float)
        self.left_out: dict[str, Check] = {}  # by thing
        self.unloadable: dict[str, Check] = {}  # by plugin
        self.phase = "loading"
        self.told: dict[str, Any] = {}  # the event that began the phase
        self.last_words = ""  # of the process that ended
        self.begun, self.collected, self.since = 0.0, 0.0, 0.0  # on the clock

    def run(self) -> None:
        while (end := self._process()) is not None:
            match self.phase:
                case "loading" if self._blame_plugins(end):
                    continue
                case "loading":
                    return
                case "deriving":
                    self.left_out[self.told["thing"]] = ends.of_deriving(end, self.told)
                case "started":
                    seconds = time.monotonic() - self.since
                    self.outcomes[self.told["id"]] = ends.of_check(end, self.told, seconds)
                    members = ends.concerned(end, self.told)
                    self.ends.append(self.told | {"concerns": members})
                    self.lost[self.told["thing"]] += seconds + self.collected - self.begun
                case _:
                    raise WorkbenchError(
                        f"the tests could not be collected: the process {end.how}{self.last_words}"
                    )

    def report(self) -> Report:
        last = len(self.order)
        ids = sorted(self.outcomes, key=lambda name: self.order.get(name, last))
        subject = self.subject or Subject(name=self.job.package, plugins=())
        plugins = (*subject.plugins, *self.unloadable)
        failures = (*subject.failures, *self.unloadable.values(), *self.left_out.values())
        checks = (*failures, *(self.outcomes[name] for name in ids))
        return Report(subject=dataclasses.replace(subject, plugins=plugins), checks=checks)

    def _process(self) -> End | None:
        """Run one process to its end; None if it had told everything by then."""
        job = dataclasses.replace(
            self.job,
            done=list(self.outcomes),
            ends=self.ends,
            exhausted=[thing for thing, seconds in self.lost.items() if seconds > PATIENCE],
            left_out=list(self.left_out),
        )
        self.begun = time.monotonic()
        with self._started(job, self.unloadable) as process:
            while True:
                event = process.next(self._limit())
                if isinstance(event, End):
                    self.last_words = process.last_words()
                    return event
                if event["event"] == "finished":
                    process.farewell()
                    return self._judged(event["status"], process)
                self._take(event, process)

    def _started(self, job: Job, disabled: Iterable[str]) -> Watched:
        self._enter("loading", {})
        job.write(self.folder)
        environment = {"OMP_NUM_THREADS": "1", **public_environment()}
        for name in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS"):  # the author's, for runs of their own
            environment.pop(name, None)
        environment[DISABLE] = ",".join(filter(None, (os.environ.get(DISABLE), *disabled)))
        # -P: files of the folder that the user stands in must not shadow modules.
        command = [sys.executable, "-P", "-m", "workbench.testing.check_process", str(self.folder)]
        return Watched(command, self.folder, environment)

    def _limit(self) -> float:
        return self.timeout if self.phase in ("started", "deriving") else LOADING

    def _enter(self, phase: str, told: dict[str, Any]) -> None:
        self.phase, self.told, self.since = phase, told, time.monotonic()

    def _take(self, event: dict[str, Any], process: Watched) -> None:
        match event["event"]:
            case "refused":
                raise WorkbenchError(event["message"])
            case "loaded":
                if self.subject is None:
                    sys.stderr.write(process.text(ERRORS))  # what plugins said while loading
                    self.subject = Subject.from_dict(event["subject"])
                self._enter("collecting", event)
            case "collected":
                self.collected = time.monotonic()
                for name in event["ids"]:
                    self.order.setdefault(name, len(self.order))
            case "outcome":
                before = self.outcomes.get(event["id"])
                if before is None or before.outcome != "failed":  # else it fails in teardown, too
                    self.outcomes[event["id"]] = Check(**event["check"])
            case phase:
                self._enter(phase, event)

    def _judged(self, status: int, process: Watched) -> End | None:
        """What it means that pytest returned this status."""
        cut_short = self.phase == "started" and self.told["id"] not in self.outcomes
        if cut_short or self.phase == "deriving":
            return End(how="was interrupted from inside (KeyboardInterrupt, pytest.exit)")
        if status in (0, TESTS_FAILED):
            return None
        if status == NOTHING_COLLECTED and (self.outcomes or self.left_out):
            return None
        if status == NOTHING_COLLECTED and self.job.only:
            raise selects_nothing(self.job.only)
        raise WorkbenchError(f"pytest could not run the suites{process.last_words()}")

    def _blame_plugins(self, end: End) -> bool:
        """Find the package's plugins that end a process which loads them; whether others are left.

        Raises:
            WorkbenchError: it ends without them, too.
        """
        meant = {*_plugins_meant(self.job.package, self.job.plugin_dirs)} - {*self.unloadable}
        if not meant or self._loads_without(meant) is not None:
            frames = own_frames(end.stack, None)
            where = "".join(f" (at {frame.file}:{frame.line})" for frame in frames[:1])
            raise WorkbenchError(
                f"the process that loads the plugins {end.how}{where}, and it is none of "
                f"{self.job.package!r}: {DISABLE}=NAME leaves a plugin out{self.last_words}"
            )
        ended: dict[str, End] = {}
        for plugin in sorted(meant):
            how = end if len(meant) == 1 else self._loads_without(meant - {plugin})
            if how is not None:
                ended[plugin] = how
        for plugin, how in (ended or dict.fromkeys(sorted(meant), end)).items():
            self.unloadable[plugin] = ends.of_loading(how, plugin)
        return not meant <= {*self.unloadable}

    def _loads_without(self, plugins: Iterable[str]) -> End | None:
        """How a process ends that loads all plugins but these; None if it gets over that."""
        job = dataclasses.replace(self.job, load_only=True)
        with self._started(job, {*self.unloadable, *plugins}) as process:
            event = process.next(LOADING)
            return event if isinstance(event, End) else None


def _plugins_meant(package: str, plugin_dirs: Sequence[str]) -> list[str]:
    """The plugins that a name may stand for, found without loading any."""
    files = [path.stem for folder in plugin_dirs for path in Path(folder).glob("*.py")]
    named: dict[str, str | None] = dict.fromkeys(files)
    for point in entry_points(group=GROUP):
        named[point.name] = point.dist.name if point.dist else None
    return [plugin for plugin, owner in named.items() if is_meant(package, plugin, owner)]
