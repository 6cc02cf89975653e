"""Trains a study's finalists again with other seeds, so that noise is told from merit.

A seed is of weights and data order. Everything else is the study's: the same executor, judge,
device, training, timeout and retries; what would change figures is refused, as on resuming.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from workbench.builder import default_builder
from workbench.environment import resolve_device
from workbench.errors import DiskError, FieldError, WorkbenchError
from workbench.executors import Executor, Task, open_executor
from workbench.files import make_folder, read_json, write_json
from workbench.identity import identity, refuse_change
from workbench.intervals import FOLDER, repeated_objectives
from workbench.ledger import JUDGED
from workbench.records import Study, Trial, load_study
from workbench.space import Space
from workbench.study_config import RuntimeConfig, StudyConfig
from workbench.trial import Workplace
from workbench.verdict import Verdict

POLL = 1.0  # seconds between looks at whether a cluster has a free slot
SILENCE = 30.0  # seconds of training after which a line says how far it is

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class _Job:
    """One training that is wanted: a trial, and whose seed."""

    trial: Trial
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"trial {self.trial.number}, seed {self.seed}"

    def record(self) -> dict[str, Any]:
        """What is on record of it; empty if nothing is, or nothing that can be read."""
        try:
            data = read_json(self.folder / "trial.json")
        except WorkbenchError:
            return {}  # listings show a damaged record as such; it is trained again
        return data if isinstance(data, dict) else {}

    @property
    def is_settled(self) -> bool:
        """Whether it needs no training any more."""
        record = self.record()
        return record.get("outcome") in JUDGED and bool(record.get("given_up", True))


def confirm(
    name: str,
    runs: str | Path | None = None,
    *,
    seeds: int = 3,
    trials: Sequence[int] = (),
    runtime: Mapping[str, Any] | None = None,
    say: Say = lambda line: None,
) -> Study:
    """Train finalists again; returns the study, whose `confirmed()` has the intervals.

    What is on record is not trained again. The study may run at the same time.

    Args:
        seeds: trainings of each finalist, the search's own included.
        trials: the finalists; the Pareto front if empty.
        runtime: fields of `[runtime]` that differ from the study's (`workers`, say).
        say: is told of each training.

    Raises:
        WorkbenchError: no such trial; no objective that a seed changes; the study could not be
            resumed here; another call is at it.
        KeyboardInterrupt: the next call goes on.
    """
    if seeds < 2:
        raise FieldError("seeds", f"must be at least 2 (the search's own is one), got {seeds}")
    study = load_study(name, runs)
    finalists = _finalists(study, trials)
    cache_dir = study.path.parent / ".cache"
    place = _workplace(study, runtime or {}, cache_dir)
    with _alone(study.path / FOLDER):
        wanted = other_seeds(place.config.seed, seeds - 1)
        rounds = [found for seed in wanted if (found := _unsettled(study, finalists, seed))]
        left = sum(map(len, rounds))
        for jobs in rounds:
            say(f"seed {jobs[0].seed}: {len(jobs)} to train, {left} in all")
            seeded = _reseeded(place, jobs[0].seed, cache_dir)
            with contextlib.closing(open_executor(seeded, cache_dir)) as executor:
                _Round(executor, place.config, jobs, say).run()
            left -= len(jobs)
    return Study(study.path)


def other_seeds(seed: int, count: int) -> list[int]:
    """Seeds derived from a study's: always the same ones, the first of more as of fewer."""
    found: list[int] = []
    index = 0
    while len(found) < count:
        digest = hashlib.sha256(f"confirm {seed} {index}".encode()).digest()
        candidate = int.from_bytes(digest[:4], "big")
        if candidate != seed and candidate not in found:
            found.append(candidate)
        index += 1
    return found


def _finalists(study: Study, numbers: Sequence[int]) -> list[Trial]:
    if not repeated_objectives(study):
        raise WorkbenchError(
            f"every objective of study {study.name!r} is static, the same for every seed: there is "
            "nothing to confirm."
        )
    if not numbers:
        front = study.front_trials()
        if not front:
            raise WorkbenchError(
                f"no trial of study {study.name!r} is complete: there is nothing to confirm."
            )
        return front
    trials = [study.trial(number) for number in dict.fromkeys(numbers)]
    for trial in trials:
        if trial.outcome != "complete":
            original = trial.data.get("duplicate_of")
            advice = "name complete trials" if original is None else f"name {original}"
            raise WorkbenchError(f"trial {trial.name} is {trial.outcome}: {advice}.")
    return trials


def changed_runtime(study: Study, changes: Mapping[str, Any]) -> RuntimeConfig:
    """The study's `[runtime]` with other values in some fields.

    Raises:
        FieldError, UnknownNameError: a value that it cannot have; names the field.
    """
    runtime = _config(study).runtime
    if changes.get("executor", "ray") != "ray":
        changes = {"address": None, **changes}  # the cluster's, which is not asked
    return dataclasses.replace(runtime, **changes)


def _config(study: Study) -> StudyConfig:
    if "config" not in study.data:
        raise WorkbenchError(f"{study.path / 'study.json'} is damaged: it lacks 'config'")
    return StudyConfig.from_dict(study.data["config"])


def _workplace(study: Study, changes: Mapping[str, Any], cache_dir: Path) -> Workplace:
    """The study's workplace as it would be resumed.

    Raises:
        WorkbenchError: it could not be resumed here; names what differs.
    """
    runtime = changed_runtime(study, changes)
    try:
        device = resolve_device(runtime.device)
    except FieldError as error:
        raise error.within("runtime") from None
    if runtime.threads is None and not device.startswith("cuda"):
        # Other workers would have another share of the cores, and losses that do not compare.
        threads = study.data.get("identity", {}).get("threads")
        runtime = dataclasses.replace(runtime, threads=threads)
    config = dataclasses.replace(_config(study), runtime=runtime)
    builder = default_builder(config.plugin_dirs)
    place = Workplace(config, builder, device, cache_dir)
    place.probe()
    space = Space(config.space, builder, place.data.vocab_size)
    refuse_change(study.path, identity(place, space), study.name)
    return place


def _reseeded(place: Workplace, seed: int, cache_dir: Path) -> Workplace:
    """The same with another seed, and without constraints.

    A figure that happens to violate one must not be missing from a mean.
    """
    config = place.config
    report = tuple(name for name in config.metric_names if name not in config.objectives)
    config = dataclasses.replace(config, seed=seed, constraints={}, report=report)
    return Workplace(config, place.builder, place.device, cache_dir)


def _unsettled(study: Study, trials: Sequence[Trial], seed: int) -> list[_Job]:
    """What is still to be trained with a seed."""
    folder = study.path / FOLDER
    jobs = [_Job(trial, seed, folder / f"{trial.number:05d}" / str(seed)) for trial in trials]
    return [job for job in jobs if not job.is_settled]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Inside, no other process confirms the same study.

    Raises:
        WorkbenchError: one does.
        DiskError: the folder cannot be written, or its file system knows no locks.
    """
    make_folder(folder)
    try:
        lock = (folder / ".lock").open("a")
    except OSError as error:
        raise DiskError(f"cannot write to {folder}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkbenchError(
                f"another process confirms this study already ({folder}): wait for it."
            ) from None
        except OSError as error:
            raise DiskError(f"cannot lock {folder / '.lock'}: {error.strerror}") from None
        yield


class _Round:
    """All trainings with one seed.

    Args:
        executor: whose workers have that seed.
        config: the study's own, with its constraints.
        jobs: what is to be trained.
    """

    def __init__(
        self, executor: Executor, config: StudyConfig, jobs: Sequence[_Job], say: Say
    ) -> None:
        self.executor = executor
        self.config = config
        self.say = say
        self.waiting = list(jobs)
        self.flights: dict[int, _Job] = {}
        self.records: dict[int, dict[str, Any]] = {}
        self.began: dict[int, float] = {}
        self.told: dict[int, float] = {}

    def run(self) -> None:
        """Train them all; faults are recorded, and tried again as often as the study would."""
        try:
            while self.waiting or self.flights:
                while self.waiting and len(self.flights) < self.executor.slots:
                    self._start(self.waiting.pop(0))
                for number, verdict in self.executor.wait(self._heard, POLL):
                    self._ended(self.flights.pop(number), verdict)
        except KeyboardInterrupt:
            self._put_back("stopped by the user")
            raise
        except WorkbenchError as error:
            self._put_back(str(error))
            raise

    def _start(self, job: _Job) -> None:
        before, trial = job.record(), job.trial
        number = trial.number
        # One that crashed counts as an attempt; one that was stopped does not.
        attempt = before.get("attempt", 0) + (before.get("outcome") == "crashed")
        self.records[number] = {
            "number": number,
            "seed": job.seed,
            "outcome": "running",
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "attempt": attempt,
            "layout_hash": trial.layout.hash,
            "pattern": trial.pattern,
        }
        make_folder(job.folder)
        write_json(job.folder / "trial.json", self.records[number])
        self.flights[number] = job
        self.began[number] = self.told[number] = time.monotonic()
        self.executor.submit(Task(number=number, layout=trial.layout, folder=job.folder))

    def _heard(self, number: int, message: dict[str, Any]) -> None:
        now = time.monotonic()
        if "progress" in message and now - self.told[number] >= SILENCE:
            self.told[number] = now
            self.say(
                f"{self.flights[number].name}: {message['progress']:.0%} of the training, "
                f"loss {message['loss']:.4g}"
            )

    def _ended(self, job: _Job, verdict: Verdict) -> None:
        record = self._record(job, verdict)
        why = f" ({verdict.reason})" if verdict.reason else ""
        self.say(f"{job.name}: {verdict.outcome.replace('_', ' ')}{why}, {record['seconds']:.1f} s")
        if verdict.outcome == "interrupted":
            raise WorkbenchError(f"{verdict.reason}. Mend that and confirm the study again.")
        if record.get("given_up", True):
            for path in (job.folder / "checkpoint.safetensors", *job.folder.glob("*.tmp")):
                path.unlink(missing_ok=True)
        else:
            self.waiting.append(job)

    def _record(self, job: _Job, verdict: Verdict) -> dict[str, Any]:
        """Put the end of a training on record."""
        number = job.trial.number
        record = self.records.pop(number)
        record.update(verdict.to_dict())
        record["environment"] = record["details"].pop("environment", {})
        record["seconds"] = round(time.monotonic() - self.began.pop(number), 3)
        record["constraints"] = {
            name: bounds.violation(verdict.metrics[name])
            for name, bounds in self.config.constraints.items()
            if name in verdict.metrics
        }
        if verdict.outcome == "crashed":
            record["given_up"] = record["attempt"] + 1 > self.config.budget.retries
        write_json(job.folder / "trial.json", record)
        return record

    def _put_back(self, reason: str) -> None:
        """Record everything in flight as interrupted: the next call goes on with it."""
        self.executor.cancel()
        for job in self.flights.values():
            self._record(job, Verdict(outcome="interrupted", reason=reason))
        self.flights.clear()
