"""Searchers at equal training compute: ours beside Optuna's alone.

    python benchmarks/search.py --tabulate studies/oracle_tiny.toml TABLE.json   trains every layout
    python benchmarks/search.py TABLE.json [--seeds 10]                          regret on that
    python benchmarks/search.py --train studies/search_tiny.toml [--trainings 40] [--seeds 5]

A table holds the figures of every layout of a study's space, by real training, at each rung and at
the end. Searchers are then replayed on it, and charged the training steps that they would have
spent. Their budget is a quarter of the steps that training every layout takes. `--train` does the
same on a space too large for a table: a layout is trained when a searcher first asks for it.

Random search, NSGA-II and TPE are Optuna's alone: every suggestion that can be built is trained to
the end, known or not. `workbench` is the study's own loop (`scheduler.py`, on a storage of its own)
with the named sampler and an executor that looks figures up: known layouts are not trained again,
and rungs stop trainings but in the rows that say `no rungs`.

Regret is 1 minus the found share of the true front's hypervolume (`workbench/regret.py`). With
`--train` nobody knows the true front; the front of all that any searcher trained stands for it,
and the hypervolume is a share of that front's.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import platform
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import optuna

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.search_table import (
    BUDGET,
    Figures,
    History,
    Table,
    Trainings,
    tabulate,
    values,
    verdict_of,
)
from workbench import storage
from workbench.builder import Builder, default_builder
from workbench.environment import package_versions, processor_name
from workbench.errors import FieldError, WorkbenchError
from workbench.executors import Ended, Executor, Heard, Task
from workbench.files import read_json, write_json
from workbench.identity import identity
from workbench.ledger import Ledger, objectives_of
from workbench.parents import joined
from workbench.pareto import pareto_front
from workbench.rank_correlation import kendall_tau
from workbench.regret import Regret
from workbench.reporter import Reporter
from workbench.rungs import CONTINUE, Peer, Rungs
from workbench.scheduler import Scheduler
from workbench.space import Space
from workbench.study import study_record
from workbench.trial import Workplace, make_metrics
from workbench.verdict import PAUSED, Verdict

SHARES = (0.1, BUDGET)
HALF = 0.5
ASKS = 20  # suggestions a layout of the budget, after which a plain searcher is given up
TPE = "TPE (multivariate, group)"
OWN = "workbench"
OPTUNAS: dict[str, dict[str, Any]] = {
    "random": {"class": "optuna.samplers.RandomSampler"},
    "NSGA-II": {"class": "optuna.samplers.NSGAIISampler"},
    TPE: {"class": "optuna.samplers.TPESampler", "multivariate": True, "group": True},
}
SURROGATE = {"class": "workbench.sampler.SurrogateSampler"}
# Of our loop: with the study's rungs or none, and its sampler.
OURS: dict[str, tuple[bool, dict[str, Any]]] = {
    f"{OWN}, TPE, no rungs": (False, {}),
    f"{OWN}, TPE": (True, {}),
    f"{OWN}, surrogate, no rungs": (False, SURROGATE),
    f"{OWN}, surrogate": (True, SURROGATE),
}
SEARCHERS = (*OPTUNAS, *OURS)


def plain(figures: Figures, builder: Builder, sampler: Any) -> History:
    """Optuna alone: what can be built is trained to the end, known or not."""
    space = Space(figures.config.space, builder, figures.vocab_size)
    study = optuna.create_study(
        sampler=sampler,
        directions=[
            optuna.study.StudyDirection[objective["direction"].upper()]
            for objective in figures.objectives
        ],
    )
    history: History = []
    spent = 0
    for _ in range(ASKS * math.ceil(figures.budget / figures.steps)):
        if spent + figures.steps > figures.budget:
            break
        trial = study.ask()
        try:
            row = figures.row(space.suggest(trial))
        except FieldError:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        if row["outcome"] == "infeasible":  # told by the layout alone: costs no training
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            continue
        spent += figures.steps
        history.append((spent, row["layout_hash"]))
        if row["outcome"] == "complete":
            study.tell(trial, values(figures, row))
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
    return history


class SpentError(WorkbenchError):
    """The searcher's budget is spent."""


class ReplayExecutor(Executor):
    """Looks trainings up, and counts the steps that they would have taken."""

    def __init__(self, figures: Figures) -> None:
        self.figures = figures
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
        self.spent += (task.stop or self.figures.steps) - (passed[-1]["step"] if passed else 0)
        if self.spent > self.figures.budget:
            raise SpentError("the budget is spent")
        row = self.figures.row(task.layout)
        if task.stop is not None and len(row["rungs"]) > len(passed):
            rung = {**row["rungs"][len(passed)], "seconds": 0.0}
            return [(task.number, Verdict(outcome=PAUSED, rungs=[*passed, rung]))]
        self.history.append((self.spent, task.layout.hash))
        return [(task.number, verdict_of(row, passed))]

    def cancel(self) -> None:
        self._task = None

    def close(self) -> None:
        self.cancel()


def own(
    figures: Figures,
    builder: Builder,
    seed: int,
    cache: Path,
    *,
    rungs: bool = True,
    sampler: dict[str, Any] | None = None,
) -> History:
    """The study's own loop, on a storage of its own."""
    config = dataclasses.replace(
        figures.config,
        seed=seed,
        sampler=figures.config.sampler if sampler is None else sampler,
        budget=dataclasses.replace(figures.config.budget, trials=1_000_000, seconds=None),
    )
    if not rungs:
        config = dataclasses.replace(config, rungs=dataclasses.replace(config.rungs, at=()))
    place = Workplace(config, builder, "cpu", cache)
    space = Space(config.space, builder, place.data.vocab_size)
    passing = Rungs(config.rungs, place.metrics, config.objectives, place.training.steps)
    executor = ReplayExecutor(figures)
    facts = study_record(place, space, identity(place, space))
    with tempfile.TemporaryDirectory() as name, joined(Path(name) / "study") as parent:
        objectives = objectives_of(place.metrics, config.objectives)
        ledger = Ledger(parent.folder, objectives, 0, parent=parent)
        ledger.open(config.name, facts)
        with contextlib.suppress(SpentError):
            try:
                Scheduler(place, space, ledger, passing, Reporter(), executor).run()
            except WorkbenchError as error:  # every layout is known before the budget is spent
                if "exhausted" not in str(error):
                    raise
    return executor.history


def search(figures: Figures, name: str, seed: int) -> History:
    """One searcher's run."""
    builder = default_builder(figures.config.plugin_dirs)
    if name in OPTUNAS:
        return plain(figures, builder, storage.make_sampler(OPTUNAS[name], seed))
    with tempfile.TemporaryDirectory() as cache:
        rungs, sampler = OURS[name]
        return own(figures, builder, seed, Path(cache), rungs=rungs, sampler=sampler)


def _search(opened: Callable[[], Figures], name: str, seed: int) -> History:
    """The same in a process of its own."""
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    return search(opened(), name, seed)


def histories(
    opened: Callable[[], Figures], seeds: Sequence[int], names: Sequence[str], jobs: int
) -> Iterator[tuple[str, list[History]]]:
    """Of every searcher, one a seed, as they come.

    Args:
        opened: gives the figures, in whatever process it is called.
        jobs: processes; 1 for none but this.
    """
    if jobs == 1:
        figures = opened()
        for name in names:
            yield name, [search(figures, name, seed) for seed in seeds]
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        runs = {n: [pool.submit(_search, opened, n, seed) for seed in seeds] for n in names}
        for name, futures in runs.items():
            yield name, [future.result() for future in futures]


def compare(
    table: Table, seeds: Sequence[int], names: Sequence[str] = SEARCHERS, jobs: int = 1
) -> Iterator[str]:
    """Lines of the markdown table: mean and standard error of the regret, over seeds.

    `equals TPE's after`: the compute after which the mean regret is no more than TPE's at the end.
    """
    found = dict(histories(partial(_same, table), seeds, names, jobs))

    def regrets(name: str, share: float) -> list[float]:
        return [100 * table.regret_at(history, share) for history in found[name]]

    goal = statistics.fmean(regrets(TPE, BUDGET))
    heads = [*(f"regret at {share:.0%} of the compute" for share in SHARES)]
    heads += ["equals TPE's after", "trained to the end"]
    yield f"| searcher | {' | '.join(heads)} |"
    yield f"|---{'|---:' * len(heads)}|"
    for name in names:
        shares = [share / 200 for share in range(1, round(200 * BUDGET) + 1)]
        after = next((s for s in shares if statistics.fmean(regrets(name, s)) <= goal), None)
        cells = [mean(regrets(name, share), " %") for share in SHARES]
        cells.append("–" if after is None else f"{after:.1%}")
        cells.append(mean([float(len({n for _, n in history})) for history in found[name]]))
        yield f"| {name} | {' | '.join(cells)} |"


def rung_lines(table: Table) -> Iterator[str]:
    """What the table says of its study's first rung, with the study's margin and with none.

    Every layout is held against all others there; a study, which meets them one after another,
    stops fewer.
    """
    config = table.config
    rows = [row for row in table.rows.values() if row["outcome"] == "complete"]
    front = pareto_front([table.points[row["layout_hash"]] for row in rows])
    peers = [
        Peer(number, row["layout_hash"], row["metrics"], row["rungs"][:1])
        for number, row in enumerate(rows)
    ]
    name = config.objectives[0]
    there, end = zip(
        *((row["rungs"][0]["metrics"][name], row["metrics"][name]) for row in rows), strict=True
    )
    share, tau = config.rungs.at[0], kendall_tau(there, end)
    yield f"Rung at {share:.0%}: Kendall's tau of {name} there and at the end {tau:.2f}."
    metrics = make_metrics(config, default_builder(config.plugin_dirs))
    for margin in dict.fromkeys((0.0, config.rungs.margin)):
        strict = dataclasses.replace(config.rungs, margin=margin, min_peers=1)
        rungs = Rungs(strict, metrics, config.objectives, table.steps)
        left = {peer.number for peer in peers if rungs.decide(peer, peers)["decision"] == CONTINUE}
        yield (
            f"Margin {margin:g}: {len(left)} of {len(rows)} layouts go on, "
            f"{len(left & set(front))} of the {len(front)} on the true front."
        )


def _same(table: Table) -> Table:
    return table


def race(
    trainings: Trainings,
    opened: Callable[[], Figures],
    seeds: Sequence[int],
    names: Sequence[str] = SEARCHERS,
    jobs: int = 1,
) -> Iterator[str]:
    """Lines of the markdown table: hypervolume at equal compute, and what TPE's took.

    The last column is the compute after which a searcher's mean hypervolume is TPE's at the end.
    """
    found = dict(histories(opened, seeds, names, jobs))
    points = trainings.points()
    regret = Regret(list(points.values()))

    def volumes(name: str, share: float) -> list[float]:
        limit = share * trainings.budget
        return [
            1 - regret.of([points[n] for spent, n in history if spent <= limit and n in points])
            for history in found[name]
        ]

    goal = statistics.fmean(volumes(TPE, 1.0))
    heads = ["half the compute", "all of it", "÷ TPE's", "equals TPE's after", "trained to the end"]
    yield f"| searcher | hypervolume at {' | '.join(heads)} |"
    yield f"|---{'|---:' * len(heads)}|"
    for name in names:
        end = volumes(name, 1.0)
        shares = [share / 100 for share in range(1, 101)]
        after = next((s for s in shares if statistics.fmean(volumes(name, s)) >= goal), None)
        cells = [
            mean([100 * volume for volume in volumes(name, HALF)], " %"),
            mean([100 * volume for volume in end], " %"),
            f"{statistics.fmean(end) / goal:.3f}",
            "–" if after is None else f"{after:.0%}",
            mean([float(len({n for _, n in history})) for history in found[name]]),
        ]
        yield f"| {name} | {' | '.join(cells)} |"


def mean(numbers: Sequence[float], unit: str = "") -> str:
    """Mean and standard error."""
    error = statistics.stdev(numbers) / math.sqrt(len(numbers))
    return f"{statistics.fmean(numbers):.2f} ± {error:.2f}{unit}"


def surroundings() -> str:
    """Device, versions and date."""
    versions = package_versions(("torch", "optuna"))
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    python = platform.python_version()
    return f"{processor_name()}, Python {python}, {named}, {datetime.now(UTC):%Y-%m-%d}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("table", nargs="?", type=Path, help="a table of --tabulate")
    parser.add_argument("--tabulate", nargs=2, type=Path, metavar=("STUDY.toml", "OUT.json"))
    parser.add_argument("--train", type=Path, metavar="STUDY.toml", help="train what is asked for")
    parser.add_argument("--trainings", type=int, default=40, help="whole ones, of each --train run")
    parser.add_argument("--seeds", type=int, default=10, help="how many, at least 5")
    parser.add_argument("--jobs", type=int, default=1, help="searches at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="keeps what is trained")
    options = parser.parse_args()
    asked = [options.table, options.tabulate, options.train]
    if sum(one is not None for one in asked) != 1 or options.seeds < 5:
        parser.error("give a table, --train or --tabulate; and at least 5 seeds")
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    try:
        run(options)
    except WorkbenchError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace) -> None:
    """What the command line asks for."""
    if options.tabulate is not None:
        study, out = options.tabulate
        write_json(out, tabulate(study, options.runs))
        return
    seeds = range(options.seeds)
    if options.table is not None:
        table = Table(read_json(options.table))
        head = f"{table.config.name}: {len(table.rows)} layouts, {table.trainable} of them "
        head += f"trainable, {table.steps} steps each"
        lines = compare(table, seeds, jobs=options.jobs)
    else:
        opened = partial(Trainings, options.train, options.runs, options.trainings)
        trainings = opened()
        head = f"{trainings.config.name}: {options.trainings} trainings of {trainings.steps} steps"
        lines = race(trainings, opened, seeds, jobs=options.jobs)
    print(f"{surroundings()}\n")
    print(f"{head}; {options.seeds} seeds, mean ± standard error.\n", flush=True)
    for line in lines:
        print(line, flush=True)
    if options.table is not None:
        print("\n" + "\n".join(rung_lines(table)))


if __name__ == "__main__":
    sys.exit(main())
