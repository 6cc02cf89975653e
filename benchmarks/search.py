"""Searchers on a tabulated space: hypervolume regret at equal training compute.

    python benchmarks/search.py --tabulate studies/oracle_tiny.toml TABLE.json   trains every layout
    python benchmarks/search.py TABLE.json [--seeds 10]                          compares searchers

A table holds the figures of every layout of a study's space, by real training, at each rung and at
the end. Searchers are then replayed on it, and charged the training steps that they would have
spent. Their budget is a quarter of the steps that training every layout takes. Random search,
NSGA-II and TPE are Optuna's alone: every suggestion that can be built is trained to the end, known
or not. `workbench` is the study's own loop (`scheduler.py`, on a storage of its own) with an
executor that looks figures up: known layouts are not trained again, and rungs stop trainings.

Regret is 1 minus the found share of the true front's hypervolume (`workbench/regret.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna

from workbench import storage
from workbench.builder import Builder, default_builder
from workbench.errors import FieldError, WorkbenchError
from workbench.executors import Ended, Executor, Heard, Task
from workbench.files import read_json, write_json
from workbench.identity import identity
from workbench.ledger import Ledger, objectives_of
from workbench.oracle import Oracle
from workbench.parents import joined
from workbench.regret import Regret
from workbench.reporter import Reporter
from workbench.rungs import Rungs
from workbench.scheduler import Scheduler
from workbench.space import Space
from workbench.study import study_record
from workbench.study_config import StudyConfig
from workbench.trial import Workplace
from workbench.verdict import PAUSED, Verdict

BUDGET = 0.25  # of the steps that training every layout takes
SHARES = (0.1, BUDGET)
ASKS = 20  # suggestions a layout of the budget, after which a plain searcher is given up
History = list[tuple[int, str]]  # steps spent when a training ended, and its layout


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
            "rungs": [
                {name: rung[name] for name in ("step", "tokens", "metrics")}
                for rung in trial.data["rungs"]
            ],
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


class _Lines(Reporter):
    """A line a layout on standard error."""

    def trial_finished(self, trial: Any) -> None:
        print(trial.number, trial.pattern, trial.outcome, trial.metrics, file=sys.stderr)


class Table:
    """A tabulated space.

    Attributes:
        rows: by layout hash.
        steps: of a whole training.
        budget: steps that a searcher may spend.
    """

    def __init__(self, data: dict[str, Any]) -> None:
        self.config = StudyConfig.from_dict(data["config"])
        self.vocab_size: int = data["vocab_size"]
        self.steps: int = data["steps"]
        self.rows: dict[str, Any] = {row["layout_hash"]: row for row in data["layouts"]}
        self.objectives: list[dict[str, str]] = data["objectives"]
        self.trainable = sum(row["outcome"] != "infeasible" for row in self.rows.values())
        self.budget = math.floor(BUDGET * self.trainable * self.steps)
        complete = [name for name, row in self.rows.items() if row["outcome"] == "complete"]
        self.points = {name: self._point(self.rows[name]) for name in complete}
        self.regret = Regret(list(self.points.values()))

    def values(self, row: dict[str, Any]) -> list[float]:
        """A complete layout's objectives."""
        return [row["metrics"][objective["name"]] for objective in self.objectives]

    def _point(self, row: dict[str, Any]) -> list[float]:
        signs = [1.0 if o["direction"] == "minimize" else -1.0 for o in self.objectives]
        return [sign * value for sign, value in zip(signs, self.values(row), strict=True)]

    def regret_at(self, history: History, share: float) -> float:
        """The regret after a share of the steps that training every layout takes."""
        limit = share * self.trainable * self.steps
        found = {name for spent, name in history if spent <= limit}
        return self.regret.of([self.points[name] for name in found if name in self.points])


def plain(table: Table, builder: Builder, sampler: Any) -> History:
    """Optuna alone: what can be built is trained to the end, known or not."""
    space = Space(table.config.space, builder, table.vocab_size)
    study = optuna.create_study(
        sampler=sampler,
        directions=[
            optuna.study.StudyDirection[objective["direction"].upper()]
            for objective in table.objectives
        ],
    )
    history: History = []
    spent = 0
    for _ in range(ASKS * math.ceil(table.budget / table.steps)):
        if spent + table.steps > table.budget:
            break
        trial = study.ask()
        try:
            row = table.rows[space.suggest(trial).hash]
        except FieldError:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        if row["outcome"] == "infeasible":  # told by the layout alone: costs no training
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            continue
        spent += table.steps
        history.append((spent, row["layout_hash"]))
        if row["outcome"] == "complete":
            study.tell(trial, table.values(row))
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
    return history


class SpentError(WorkbenchError):
    """The searcher's budget is spent."""


class TableExecutor(Executor):
    """Looks trainings up, and counts the steps that they would have taken."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.history: History = []
        self.spent = 0
        self._task: Task | None = None

    @property
    def slots(self) -> int:
        return 1

    def submit(self, task: Task) -> None:
        self._task = task

    def wait(self, heard: Heard, timeout: float | None = None) -> list[Ended]:
        task, self._task = self._task, None
        if task is None:
            return []
        passed = list((task.begun or {}).get("rungs", ()))
        self.spent += (task.stop or self.table.steps) - (passed[-1]["step"] if passed else 0)
        if self.spent > self.table.budget:
            raise SpentError("the budget is spent")
        row = self.table.rows[task.layout.hash]
        if task.stop is not None and len(row["rungs"]) > len(passed):
            rung = {**row["rungs"][len(passed)], "seconds": 0.0}
            return [(task.number, Verdict(outcome=PAUSED, rungs=[*passed, rung]))]
        self.history.append((self.spent, task.layout.hash))
        seconds = {"training": float(row["seconds"])}
        metrics = dict(row["metrics"])
        found = Verdict(
            outcome=row["outcome"], metrics=metrics, rungs=passed, stage_seconds=seconds
        )
        return [(task.number, found)]

    def cancel(self) -> None:
        self._task = None

    def close(self) -> None:
        self.cancel()


def own(table: Table, builder: Builder, seed: int, cache: Path) -> History:
    """The study's own loop, on a storage of its own."""
    config = dataclasses.replace(
        table.config,
        seed=seed,
        budget=dataclasses.replace(table.config.budget, trials=1_000_000, seconds=None),
    )
    place = Workplace(config, builder, "cpu", cache)
    space = Space(config.space, builder, place.data.vocab_size)
    rungs = Rungs(config.rungs, place.metrics, config.objectives, place.training.steps)
    executor = TableExecutor(table)
    facts = study_record(place, space, identity(place, space))
    with tempfile.TemporaryDirectory() as name, joined(Path(name) / "study") as parent:
        objectives = objectives_of(place.metrics, config.objectives)
        ledger = Ledger(parent.folder, objectives, 0, parent=parent)
        ledger.open(config.name, facts)
        with contextlib.suppress(SpentError):
            try:
                Scheduler(place, space, ledger, rungs, Reporter(), executor).run()
            except WorkbenchError as error:  # every layout is known before the budget is spent
                if "exhausted" not in str(error):
                    raise
    return executor.history


def searchers(table: Table, builder: Builder, cache: Path) -> dict[str, Callable[[int], History]]:
    """What is compared: a seed to a history each."""

    def optunas(name: str, **options: Any) -> Callable[[int], History]:
        arguments = {"class": f"optuna.samplers.{name}", **options}
        return lambda seed: plain(table, builder, storage.make_sampler(arguments, seed))

    return {
        "random": optunas("RandomSampler"),
        "NSGA-II": optunas("NSGAIISampler"),
        "TPE (multivariate, group)": optunas("TPESampler", multivariate=True, group=True),
        "workbench": lambda seed: own(table, builder, seed, cache),
    }


def compare(table: Table, seeds: Sequence[int], names: Sequence[str] = ()) -> list[str]:
    """The markdown table: mean and standard error of the regret, over seeds.

    Args:
        names: of the searchers; all if empty.
    """
    builder = default_builder(table.config.plugin_dirs)
    heads = [*(f"regret at {share:.0%} of the compute" for share in SHARES), "trained to the end"]
    lines = [f"| searcher | {' | '.join(heads)} |", f"|---{'|---:' * len(heads)}|"]
    with tempfile.TemporaryDirectory() as cache:
        for name, search in searchers(table, builder, Path(cache)).items():
            if names and name not in names:
                continue
            histories = [search(seed) for seed in seeds]
            cells = [
                mean([100 * table.regret_at(history, share) for history in histories], " %")
                for share in SHARES
            ]
            cells.append(mean([float(len({n for _, n in history})) for history in histories]))
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def mean(values: Sequence[float], unit: str = "") -> str:
    """Mean and standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):.2f} ± {error:.2f}{unit}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("table", nargs="?", type=Path, help="a table of --tabulate")
    parser.add_argument("--tabulate", nargs=2, type=Path, metavar=("STUDY.toml", "OUT.json"))
    parser.add_argument("--seeds", type=int, default=10, help="how many, at least 5")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="keeps what is trained")
    options = parser.parse_args()
    if (options.table is None) == (options.tabulate is None) or options.seeds < 5:
        parser.error("give a table (and at least 5 seeds), or --tabulate STUDY.toml OUT.json")
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    try:
        if options.tabulate is not None:
            study, out = options.tabulate
            write_json(out, tabulate(study, options.runs))
        else:
            table = Table(read_json(options.table))
            outcomes = f"{len(table.rows)} layouts, {table.trainable} of them trainable"
            print(f"{table.config.name}: {outcomes}, {table.steps} steps each; {options.seeds}")
            print("seeds, mean ± standard error.\n")
            print("\n".join(compare(table, range(options.seeds))))
    except WorkbenchError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
