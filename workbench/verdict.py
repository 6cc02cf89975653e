"""Verdicts: how a trial ended, and what whatever it raised stands for. Loads no torch."""

from __future__ import annotations

import dataclasses
import errno
import re
import time
import traceback
from pathlib import Path
from typing import Any

from workbench.errors import DiskError, FieldError, WorkbenchError

PAUSED = "paused"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InfeasibleError(Exception):
    """The trial goes no further: a constraint is violated, or a quantizer refuses a block."""


@dataclasses.dataclass
class Verdict:
    """How a trial ended, as its record keeps it.

    Attributes:
        outcome: a key of `records.OUTCOMES`.
        reason: why, for people.
        metrics, extras: figures by name; an extra that is not finite is None.
        notes: words beside the figures, by name.
        constraints: violation by metric name; above 0 is violated.
        stage_seconds: wall seconds by stage.
        rungs: what the trial reached on its way: `step`, `tokens`, `metrics` and `seconds` each.
        details: further facts (quantizer reports, environment, kernels, how training ran).
    """

    outcome: str = "complete"  # or PAUSED, which is no end
    reason: str = ""
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    extras: dict[str, float | None] = dataclasses.field(default_factory=dict)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    constraints: dict[str, float] = dataclasses.field(default_factory=dict)
    stage_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    rungs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def update(self, other: Verdict) -> None:
        """Take over what a later stage found."""
        self.outcome, self.reason = other.outcome, other.reason
        for name in ("metrics", "extras", "notes", "constraints", "stage_seconds", "details"):
            getattr(self, name).update(getattr(other, name))
        self.rungs = other.rungs or self.rungs  # a later stage of the same trial knows them all


class Timed:
    """Adds the wall seconds of a block to a verdict, also when the block raises."""

    def __init__(self, verdict: Verdict, stage: str) -> None:
        self.verdict, self.stage = verdict, stage

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        seconds = time.perf_counter() - self.started
        before = self.verdict.stage_seconds.get(self.stage, 0.0)
        self.verdict.stage_seconds[self.stage] = before + seconds


class Recorded:
    """Turns whatever a block raises, sys.exit too, but for an interrupt, into the outcome.

    Args:
        folder, built: as `verdict_of` takes them.
    """

    def __init__(self, verdict: Verdict, folder: Path, *, built: bool = False) -> None:
        self.verdict, self.folder, self.built = verdict, folder, built

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is None or isinstance(error, KeyboardInterrupt):
            return False
        found = verdict_of(error, self.folder, built=self.built)
        self.verdict.outcome, self.verdict.reason = found.outcome, found.reason
        return True


def verdict_of(error: BaseException, folder: Path, *, built: bool = False) -> Verdict:
    """The verdict that an exception stands for; an error leaves its traceback behind.

    Args:
        folder: of the trial; the traceback is added to its `log.txt`.
        built: as `classify` takes it.
    """
    outcome, reason = classify(error, built=built)
    if outcome == "error":
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            traceback.print_exception(error, file=log)
    return Verdict(outcome=outcome, reason=reason)


def classify(error: BaseException, *, built: bool = False) -> tuple[str, str]:
    """The outcome that an exception stands for, and its reason in words.

    Args:
        built: the layout has passed every check, so that a FieldError no longer says that it
            cannot be built: a layer, metric or data source fails at its work.
    """
    import torch  # not for those who only pass verdicts on

    from workbench.training import DivergedError

    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    if isinstance(error, InfeasibleError) or (isinstance(error, FieldError) and not built):
        return "infeasible", str(error)
    if isinstance(error, DiskError) or (isinstance(error, OSError) and error.errno in DISK_FULL):
        return "interrupted", str(error)
    if isinstance(error, DivergedError):
        return "diverged", str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _is_allocator(error):
        wanted = re.search(r"tried to allocate (\d+) bytes", str(error), re.IGNORECASE)
        return (
            "out_of_memory",
            f"an allocation of {int(wanted[1]):,} bytes failed" if wanted else text,
        )
    return "error", str(error) if isinstance(error, WorkbenchError) else text


def _is_allocator(error: BaseException) -> bool:
    # torch's CPU allocator raises a plain RuntimeError, so only its words tell.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
