"""The worker process: reads jobs from standard input, answers on its first standard output.

Both ways a JSON object a line. Whatever plugins print goes to the trial's log instead.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from workbench.errors import WorkbenchError
from workbench.executors.base import Job
from workbench.python_cache import use_python_cache

if TYPE_CHECKING:
    from workbench.builder import Builder


def main() -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), 1)
    requests = _Requests(os.fdopen(os.dup(0), encoding="utf-8"))
    # A plugin that asks for input gets none, instead of a request.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    first = requests.next()
    seconds: dict[str, float] = {}
    try:
        place = open_place(Job.from_dict(first), seconds)
    except WorkbenchError as error:
        _send(answers, {"failed": str(error)})
        return
    ready = {"ready": os.getpid(), "environment": _environment(place), "seconds": seconds}
    _send(answers, ready)
    while True:
        request = requests.next()
        _send(answers, {"verdict": _serve(place, request, answers)})


def open_place(job: Job, seconds: dict[str, float]) -> Any:
    """The trials' Workplace; leaves the seconds of `imports` and `opening`."""
    started = time.perf_counter()
    use_python_cache(job.cache_dir)
    with without_collections(), _waking(job):
        import_all(job.device)
    import torch

    from workbench import kernels
    from workbench.builder import default_builder
    from workbench.identity import used_backends
    from workbench.trial import Workplace

    seconds["imports"] = time.perf_counter() - started
    if job.config.runtime.threads is not None:
        torch.set_num_threads(job.config.runtime.threads)
    with contextlib.redirect_stderr(io.StringIO()):  # the study's process has shown the same
        builder = default_builder(job.config.plugin_dirs)
    _refuse_changed(job, builder)
    kernels.take_over(job.probed)
    place = Workplace(job.config, builder, job.device, job.cache_dir)
    used_backends(place)  # probed now: what a library does at its import is no trial's doing
    if job.config.budget.memory_gb is not None:
        _limit_memory(job.config.budget.memory_gb)
    seconds["opening"] = time.perf_counter() - started - seconds["imports"]
    return place


def import_all(device: str) -> None:
    """Import whatever a trial on a device needs; of plugins nothing."""
    names = ["workbench.builder", "workbench.identity", "workbench.trial"]
    names.append("torch._dynamo")  # seconds that the first optimizer would add to its trial
    if device.startswith("cuda"):
        names.append("torch._inductor.compile_fx")  # and the first block
    for name in names:
        importlib.import_module(name)


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Import without garbage collection, and leave what was imported out of all later ones.

    Hundreds of thousands of objects that live as long as the process: 0.26 s a collection.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


@contextlib.contextmanager
def _waking(job: Job) -> Iterator[None]:
    """Wake a CUDA device in a thread of its own while this one imports: either takes seconds."""
    if not job.device.startswith("cuda"):
        yield
        return
    import torch

    from workbench.kernel_caches import use_kernel_caches

    use_kernel_caches(job.cache_dir, job.device)  # before the compiler is imported

    def wake() -> None:
        # What fails here fails again where it is needed, and is told there.
        with contextlib.suppress(RuntimeError):
            square = torch.ones(64, 64, device=job.device, dtype=torch.bfloat16)
            torch.mm(square, square)
            torch.cuda.synchronize(job.device)

    waking = threading.Thread(target=wake, daemon=True)
    waking.start()
    yield
    waking.join()


def _refuse_changed(job: Job, builder: Builder) -> None:
    """A plugin edited while its study runs would be judged under its old name."""
    from workbench.identity import used_plugins

    now = used_plugins(job.config, builder)
    for name, before in job.plugins.items():
        if now[name] != before:
            raise WorkbenchError(
                f"plugin {name!r} changed while the study ran: {before} then, {now[name]} now. "
                "Put the earlier one back and run the study again, or give it another name"
            )


def _limit_memory(gigabytes: float) -> None:
    import resource

    from workbench.errors import FieldError

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    used = pages * resource.getpagesize() / 1e9
    if used >= gigabytes:
        raise FieldError(
            "budget.memory_gb",
            f"{gigabytes:g} GB of address space are less than the {used:.1f} that a worker takes "
            "before its first trial",
        )
    allowed = int(gigabytes * 1e9)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))


def _environment(place: Any) -> dict[str, Any]:
    from workbench.environment import environment

    return environment(place.device)


def _serve(place: Any, request: dict[str, Any], answers: TextIO) -> dict[str, Any]:
    from workbench.layout import Layout
    from workbench.trial import judge
    from workbench.verdict import Verdict

    folder = Path(request["folder"])
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    layout = Layout.from_dict(request["layout"])
    verdict = judge(
        place,
        layout,
        folder,
        lambda event: _send(answers, event),
        begun=request["begun"] and Verdict(**request["begun"]),
        stop=request["stop"],
    )
    sys.stdout.flush()
    sys.stderr.flush()
    return verdict.to_dict()


def _send(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


class _Requests:
    """Lines of standard input, read by a thread: a worker whose parent is gone ends at once."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lines: list[str] = []
        self._arrived = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._stream:
            with self._arrived:
                self._lines.append(line)
                self._arrived.notify()
        os._exit(0)

    def next(self) -> Any:
        with self._arrived:
            while not self._lines:
                self._arrived.wait()
            return json.loads(self._lines.pop(0))


if __name__ == "__main__":
    main()
