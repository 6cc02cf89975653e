"""The process in which check-plugin loads a package and runs its suites: its code may end it.

Run as `python -m workbench.testing.check_process FOLDER`, with the `Job` in `FOLDER/job.json`; what
it finds, it tells at once (`workbench.testing.events`).
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError
from workbench.testing import events
from workbench.testing.subject import Subject, find_subject, own_tests
from workbench.testing.watching import EVENTS, STACK

JOB = "job.json"
MODULE = """from workbench.testing.derived_suites import suites

globals().update(suites({plugins!r}, {plugin_dirs!r}, {left_out!r}))
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What to check, and what an earlier process has done of it.

    Attributes:
        package: name of a distribution or plugin.
        plugin_dirs: folders whose files are plugins, too.
        tests: files whose contract suites go before the derived ones; those beside the plugins'
            modules if empty.
        only: pytest's `-k`: part of a name of a check or a thing, with `and`, `or`, `not`.
        load_only: load all plugins and do nothing else.
        done: ids of tests that have an outcome.
        ends: what earlier processes told (`started`) of the tests that ended them, `concerns`
            narrowed to the member that they were in, if that is known.
        exhausted: things whose checks did so for so long that no more of their kind are run.
        left_out: things for which no configs could be derived, because that ended a process.
    """

    package: str
    plugin_dirs: list[str]
    tests: list[str]
    only: str | None
    load_only: bool = False
    done: list[str] = dataclasses.field(default_factory=list)
    ends: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    exhausted: list[str] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)

    def write(self, folder: Path) -> None:
        (folder / JOB).write_text(json.dumps(dataclasses.asdict(self)), "utf-8")

    @classmethod
    def read(cls, folder: Path) -> Job:
        return cls(**json.loads((folder / JOB).read_text("utf-8")))


def main(folder: Path) -> None:
    """Do the job in this folder."""
    events.begin(folder / EVENTS)
    _note_stacks(folder / STACK)
    _end_with_parent(folder)
    job = Job.read(folder)
    try:
        subject = _load(job)
    except WorkbenchError as error:
        events.tell("refused", message=str(error))
        return
    sys.stderr.flush()
    events.tell("loaded", subject=dataclasses.asdict(subject))
    done = job.load_only or not subject.things
    events.tell("finished", status=0 if done else _run(job, subject, folder))


def _load(job: Job) -> Subject:
    from workbench.builder import default_builder

    return find_subject(job.package, default_builder(tuple(job.plugin_dirs)))


def _run(job: Job, subject: Subject, folder: Path) -> int:
    """Collect and run the suites; pytest's exit status."""
    import pytest

    from workbench.testing.continuation import Continuation

    module = folder / "test_check.py"
    module.write_text(
        MODULE.format(
            plugins=subject.plugins, plugin_dirs=tuple(job.plugin_dirs), left_out=job.left_out
        ),
        "utf-8",
    )
    (folder / "pytest.ini").write_text("[pytest]\n", "utf-8")
    _extend_path(job.plugin_dirs)
    arguments = [
        *(str(module), *(job.tests or map(str, own_tests(subject.files)))),
        *("-c", str(folder / "pytest.ini"), "--rootdir", str(folder)),
        *("--basetemp", str(folder / "temporary"), "-p", "no:cacheprovider"),
        *("-p", "workbench.testing.results", "-p", "no:faulthandler"),
        *("--import-mode=importlib", "-q", "--no-header", "--tb=short"),
        *(("-k", job.only) if job.only else ()),
    ]
    continuation = Continuation(job.done, job.ends, job.exhausted)
    return int(pytest.main(arguments, plugins=[continuation]))


def _extend_path(plugin_dirs: list[str]) -> None:
    """Let tests import what they can when pytest is run beside them, and their processes, too."""
    sys.path[:0] = plugin_dirs
    sys.path.append(os.getcwd())  # last, so that it shadows nothing
    paths = [*plugin_dirs, os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def _note_stacks(path: Path) -> None:
    """Write where the code is when a signal or `os._exit` ends this process, or the parent asks."""
    file = path.open("w", encoding="utf-8")
    faulthandler.enable(file, all_threads=False)
    faulthandler.register(signal.SIGUSR1, file, all_threads=False)
    leave, own = os._exit, os.getpid()

    def noted(status: int) -> Any:
        if os.getpid() == own:  # forked children end so as a matter of course
            faulthandler.dump_traceback(file, all_threads=False)
        leave(status)

    os._exit = noted


def _end_with_parent(folder: Path) -> None:
    """A parent that is gone can neither kill nor clear up: its end closes our standard input."""
    parent = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def wait() -> None:
        os.read(parent, 1)
        shutil.rmtree(folder, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
