"""Rungs: pauses in a training, from which only those trials go on that no peer dominates.

A rung's figures are of the partly trained, unquantized model. They are kept under `rungs` in a
trial's record, apart from its metrics, and no sampler sees them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench.errors import FieldError
from workbench.metric import UNTRAINED, Metric, Subject
from workbench.study_config import RungsConfig
from workbench.training import DivergedError

CONTINUE, STOP = "continue", "stop"
FAILED = frozenset({"infeasible", "diverged", "out_of_memory", "timeout", "error"})


def rung_metrics(metrics: Mapping[str, Metric], objectives: Sequence[str]) -> tuple[str, ...]:
    """The metrics that a rung measures: those of trained weights, and objectives that allow it."""
    return tuple(
        name
        for name, metric in metrics.items()
        if metric.stage == "trained"
        or (metric.stage == "quantized" and metric.at_rungs and name in objectives)
    )


def measure_rung(
    metrics: Mapping[str, Metric], names: Sequence[str], subject: Subject, step: int
) -> dict[str, float]:
    """The figures of a rung.

    Args:
        subject: its model is trained up to `step`, and as trained.

    Raises:
        DivergedError: one is NaN or infinite.
    """
    figures = {}
    for name in names:
        subject.extras, subject.notes = {}, {}
        figures[name] = float(metrics[name].measure(subject))
        if not math.isfinite(figures[name]):
            raise DivergedError(f"{name} is {figures[name]} at the rung of step {step}")
    return figures


@dataclasses.dataclass(frozen=True)
class Peer:
    """What of another trial's record counts at rungs."""

    number: int
    layout_hash: str
    metrics: dict[str, float]
    rungs: list[dict[str, Any]]


class Rungs:
    """The rungs of a study.

    Args:
        steps: of a whole training.

    Attributes:
        steps: the training step of each rung, ascending.

    Raises:
        FieldError: a rung that is no step of the training, or objectives that no rung can compare.
    """

    def __init__(
        self,
        config: RungsConfig,
        metrics: Mapping[str, Metric],
        objectives: Sequence[str],
        steps: int,
    ) -> None:
        self.config = config
        self.steps = tuple(round(share * steps) for share in config.at)
        for index, step in enumerate(self.steps):
            if step in (0, steps, *self.steps[:index]):
                raise FieldError(
                    f"rungs.at[{index}]",
                    f"{config.at[index]:g} of {steps} training steps is step {step}, which is no "
                    "pause of its own: choose other shares, or train longer",
                )
        self._signs = {
            name: 1.0 if metrics[name].direction == "minimize" else -1.0 for name in objectives
        }
        trained = rung_metrics(metrics, objectives)
        self._trained = [name for name in objectives if name in trained]
        # Of these a trial has its final figures: no margin for what the training may still change.
        self._final = [name for name in objectives if metrics[name].stage in UNTRAINED]
        blind = [name for name in objectives if name not in (*self._final, *self._trained)]
        if self.steps and not self._trained:
            raise FieldError(
                "rungs.at",
                "no objective can be had from a partly trained model: choose one that can (of the "
                "trained stage, or quantized with at_rungs), or leave the rungs away",
            )
        if self.steps and blind:
            raise FieldError(
                "rungs.at",
                f"objective {blind[0]!r} cannot be had from a partly trained model (its metric "
                "lacks at_rungs), so rungs would stop trials that are the best in it: make it a "
                "figure of report, or leave the rungs away",
            )

    def next_step(self, passed: Sequence[Any]) -> int | None:
        """The step of the first rung that is not among those passed; None after the last."""
        return self.steps[len(passed)] if len(passed) < len(self.steps) else None

    def decide(self, own: Peer, peers: Sequence[Peer]) -> dict[str, Any]:
        """Whether a trial goes on from the last rung that it reached.

        Args:
            peers: trials of the study; those without this rung, or of the same layout, are none.

        Returns:
            `decision` (`continue` or `stop`), how many `peers` of different layouts there are, and
            by which of them it is `dominated_by`, the one with the lowest number.
        """
        index = len(own.rungs) - 1
        here = [
            peer
            for peer in peers
            if len(peer.rungs) > index and peer.layout_hash != own.layout_hash
        ]
        layouts = len({peer.layout_hash for peer in here})  # a trial and what repeats it are one
        facts: dict[str, Any] = {"decision": CONTINUE, "peers": layouts}
        if layouts < self.config.min_peers:
            return facts
        better = [peer.number for peer in here if self._dominates(peer, own, index)]
        return {**facts, "decision": STOP, "dominated_by": min(better)} if better else facts

    def _dominates(self, peer: Peer, own: Peer, index: int) -> bool:
        """Pareto dominance, where figures of training must differ by the margin to count."""
        better = False
        for names, margin in ((self._final, 0.0), (self._trained, self.config.margin)):
            for name in names:
                mine, theirs = self._figure(own, name, index), self._figure(peer, name, index)
                if theirs + margin * abs(mine) > mine:
                    return False
                better |= theirs < mine
        return better

    def _figure(self, trial: Peer, name: str, index: int) -> float:
        """Smaller is better."""
        figures = trial.rungs[index]["metrics"] if name in self._trained else trial.metrics
        return self._signs[name] * float(figures[name])


class Peers:
    """The trials of a study that reached rungs, whoever runs them; reads what changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "trials"
        self._read: dict[Path, tuple[tuple[int, ...], Peer | None]] = {}

    def now(self) -> list[Peer]:
        """By number. Trials that failed are none: they will be on no front."""
        for path in self._folder.glob("*/trial.json"):
            status = path.stat()
            # Two writes may share a tick of the clock and a size, but not a file.
            stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
            if path not in self._read or self._read[path][0] != stamp:
                self._read[path] = (stamp, _peer(path))
        found = [peer for _, peer in self._read.values() if peer is not None]
        return sorted(found, key=lambda peer: peer.number)


def _peer(path: Path) -> Peer | None:
    """None for a record without rungs, of a trial that failed, or that cannot be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["outcome"] in FAILED or not record.get("rungs") or record.get("given_up"):
            return None
        return peer_of(record)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # listings show a damaged record as such


def peer_of(record: Mapping[str, Any]) -> Peer:
    """What of a record counts at rungs."""
    return Peer(record["number"], record["layout_hash"], record["metrics"], record["rungs"])
