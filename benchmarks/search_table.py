"""Figures of real trainings that searchers are replayed on, and charged for.

`Table` holds every layout of a small space, trained once and shipped. `Trainings` is for a space
too large for that: it trains a layout when a searcher first asks for it, and keeps the figures.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any, Protocol

import torch

from workbench.builder import default_builder
from workbench.environment import resolve_device
from workbench.errors import WorkbenchError
from workbench.files import make_folder, read_json, write_json
from workbench.layout import Layout
from workbench.ledger import objectives_of
from workbench.oracle import Oracle
from workbench.regret import Regret
from workbench.reporter import Reporter
from workbench.rungs import Rungs
from workbench.study_config import StudyConfig
from workbench.trial import Workplace, judge, judge_static
from workbench.verdict import PAUSED, Verdict

BUDGET = 0.25  # of the steps that training every layout of a table takes
History = list[tuple[int, str]]  # steps spent when a training ended, and its layout
Row = dict[str, Any]


class Figures(Protocol):
    """What a searcher needs to know.

    Attributes:
        steps: of a whole training.
        budget: steps that a searcher may spend.
        objectives: name and direction of each.
    """

    config: StudyConfig
    vocab_size: int
    steps: int
    budget: int
    objectives: list[dict[str, str]]

    def row(self, layout: Layout) -> Row:
        """A layout's figures at each rung and at the end."""
        ...


def values(figures: Figures, row: Row) -> list[float]:
    """A complete layout's objectives."""
    return [row["metrics"][objective["name"]] for objective in figures.objectives]


def point(figures: Figures, row: Row) -> list[float]:
    """The same, every one minimized."""
    signs = [1.0 if o["direction"] == "minimize" else -1.0 for o in figures.objectives]
    return [sign * value for sign, value in zip(signs, values(figures, row), strict=True)]


class Table:
    """A tabulated space.

    Args:
        data: of `tabulate`.

    Attributes:
        rows: by layout hash.
        trainable: layouts that can be trained.
        points: of the complete ones, by layout hash.
    """

    def __init__(self, data: dict[str, Any]) -> None:
        self.config = StudyConfig.from_dict(data["config"])
        self.vocab_size: int = data["vocab_size"]
        self.steps: int = data["steps"]
        self.rows: dict[str, Row] = {row["layout_hash"]: row for row in data["layouts"]}
        self.objectives: list[dict[str, str]] = data["objectives"]
        self.trainable = sum(row["outcome"] != "infeasible" for row in self.rows.values())
        self.budget = math.floor(BUDGET * self.trainable * self.steps)
        complete = [name for name, row in self.rows.items() if row["outcome"] == "complete"]
        self.points = {name: point(self, self.rows[name]) for name in complete}
        self.regret = Regret(list(self.points.values()))

    def row(self, layout: Layout) -> Row:
        return self.rows[layout.hash]

    def regret_at(self, history: History, share: float) -> float:
        """The regret after a share of the steps that training every layout takes."""
        limit = share * self.trainable * self.steps
        found = {name for spent, name in history if spent <= limit}
        return self.regret.of([self.points[name] for name in found if name in self.points])


def tabulate(study: Path, runs: Path) -> dict[str, Any]:
    """Train every layout of a study's space (or go on with that); the table as JSON data."""
    config = StudyConfig.read(study)
    oracle = Oracle(config, runs)
    truth = oracle.tabulate(_Lines())
    rows = [
        {
            "layout_hash": trial.data["layout_hash"],
            "pattern": trial.pattern,
            "params": trial.params,
            "outcome": trial.outcome,
            "metrics": trial.metrics,
            "rungs": _without_times(trial.data["rungs"]),
            "seconds": trial.data["seconds"],
        }
        for trial in truth.trials()
    ]
    return {
        "config": config.to_dict(),
        "vocab_size": oracle.place.data.vocab_size,
        "steps": oracle.place.training.steps,
        "objectives": [dataclasses.asdict(objective) for objective in truth.objectives],
        "environment": next((t.environment for t in truth.trials() if t.environment), {}),
        "layouts": rows,
    }


def _without_times(rungs: list[Row]) -> list[Row]:
    return [{name: rung[name] for name in ("step", "tokens", "metrics")} for rung in rungs]


class _Lines(Reporter):
    """A line a layout on standard error."""

    def trial_finished(self, trial: Any) -> None:
        print(trial.number, trial.pattern, trial.outcome, trial.metrics, file=sys.stderr)


class Trainings:
    """Trains layouts of a study's space when they are asked for.

    Training is deterministic (a test of the product says so), so a second searcher that asks for
    the same layout is given the same figures; it is charged all the same.

    Args:
        study: its TOML file.
        runs: folder for what is kept.
        trainings: how many whole trainings a searcher may spend.
    """

    def __init__(self, study: Path, runs: Path, trainings: int) -> None:
        self.config = StudyConfig.read(study)
        self.builder = default_builder(self.config.plugin_dirs)
        device = resolve_device(self.config.runtime.device)
        self.place = Workplace(self.config, self.builder, device, runs / ".cache")
        self.vocab_size = self.place.data.vocab_size
        self.steps = self.place.training.steps
        self.budget = trainings * self.steps
        self.rungs = Rungs(
            self.config.rungs, self.place.metrics, self.config.objectives, self.steps
        )
        self.objectives = [
            dataclasses.asdict(objective)
            for objective in objectives_of(self.place.metrics, self.config.objectives)
        ]
        self.folder = runs / f"{self.config.name}-{self._digest()}"
        make_folder(self.folder)
        torch.set_num_threads(self.place.threads)

    def _digest(self) -> str:
        """Of all that a layout's figures depend on."""
        config = self.config
        facts = [config.metric_names, config.metrics, config.data, config.training, config.seed]
        text = json.dumps([*facts, config.rungs.at, self.vocab_size], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def row(self, layout: Layout) -> Row:
        path = self.folder / f"{layout.hash}.json"
        if not path.exists():
            write_json(path, self._train(layout))
        row: Row = read_json(path)
        return row

    def _train(self, layout: Layout) -> Row:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            verdict = judge_static(self.place, layout, folder)
            going = verdict.outcome == "complete"
            while going:
                begun = verdict if verdict.rungs else None
                stop = self.rungs.next_step(verdict.rungs)
                found = judge(
                    self.place, layout, folder, lambda message: None, begun=begun, stop=stop
                )
                verdict.update(found)
                going = found.outcome == PAUSED
        if verdict.outcome not in ("complete", "infeasible", "diverged"):
            raise WorkbenchError(f"layout {layout.hash}: {verdict.outcome}: {verdict.reason}")
        return {
            "layout_hash": layout.hash,
            "pattern": self.builder.pattern(layout),
            "outcome": verdict.outcome,
            "metrics": verdict.metrics,
            "rungs": _without_times(verdict.rungs),
            "seconds": verdict.stage_seconds.get("training", 0.0),
        }

    def points(self) -> dict[str, list[float]]:
        """Of all that was ever trained to the end, by layout hash."""
        rows = [read_json(path) for path in sorted(self.folder.glob("*.json"))]
        return {r["layout_hash"]: point(self, r) for r in rows if r["outcome"] == "complete"}


def verdict_of(row: Row, rungs: list[Row]) -> Verdict:
    """How a training that passed these rungs ends."""
    seconds = {"training": float(row["seconds"])}
    metrics = dict(row["metrics"])
    return Verdict(outcome=row["outcome"], metrics=metrics, rungs=rungs, stage_seconds=seconds)
