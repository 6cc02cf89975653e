"""What a trial takes beyond its training and measuring, beside plain Optuna on the same naps.

    python benchmarks/overhead.py [--long 3] [--trials 64] [--nap 4]

Trials sleep, so that processors are no bottleneck, and train next to nothing. A worker notes when
each nap ends. Between the ends of two naps of a worker lie the rest of one trial and the beginning
of the next; less what their records say was spent there in stages that need a model (naps are the
end of the first of these), that is the overhead: suggesting, static stage, claims, records,
storage, messages, waiting for the study's process, building models. Starting processes is in none
of it: nobody does that once a trial.

`optuna`: as many processes on one SQLite file, `study.optimize` with the same sampler, the same
space and the same naps, which are all of their work. `--long` trials of 60 seconds are run with one
worker, for the share of them; 0 leaves them out.

The second table is CPU time of the study's process, by part, in the run with eight workers.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORKERS = 8
LONG = 60.0  # seconds
PLUGIN = """
import os
import time
from dataclasses import dataclass

from workbench import Metric, hookimpl


class Nap(Metric):
    unit, stage = "s", "measured"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        seconds: float
        log: str

    def measure(self, subject):
        time.sleep(self.config.seconds)
        with open(self.config.log, "a") as log:
            log.write(f"{os.getpid()} {subject.layout.hash} {time.monotonic()}\\n")
        return self.config.seconds


@hookimpl
def register_metrics(register):
    register("nap", Nap)
"""
Ends = dict[int, list[tuple[str, float]]]  # by process: each nap's layout or trial, and its end
Work = dict[
    str, tuple[float, float]
]  # by layout or trial: seconds of work up to its nap's end, after


def study(folder: Path, workers: int, nap: float, trials: int) -> dict[str, Any]:
    """A study of naps, as JSON data."""
    return {
        "name": "naps",
        "objectives": ["toy_loss", "toy_weights"],
        "report": ["nap"],
        "metrics": {"nap": {"seconds": nap, "log": str(folder / "naps.txt")}},
        "space": {
            "d_model": {"low": 8, "high": 256, "step": 8},
            "num_layers": {"low": 1, "high": 8},
            "mixers": ["toy", "other"],
            "placements": ["alternate"],
            "layers": {"toy": {"width": "search"}, "other": {"width": "search"}},
        },
        "data": {"source": "counting"},
        "training": {"tokens": 128, "batch_size": 4, "seq_len": 16},
        "budget": {"trials": trials},
        "runtime": {"device": "cpu", "executor": "process", "workers": workers, "threads": 1},
        "plugin_dirs": [str(ROOT / "tests/workbench/toy_plugins"), str(folder / "plugins")],
    }


class Parts:
    """CPU seconds of this process in some functions, each without those inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[float] = []  # seconds of inner functions, for each open one

    def watch(self, owner: Any, name: str, part: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.process_time()
            self._open.append(0.0)
            try:
                return real(*arguments, **named)
            finally:
                spent = time.process_time() - began
                self.seconds[part] += spent - self._open.pop()
                if self._open:
                    self._open[-1] += spent

        setattr(owner, name, timed)


def ours(nap: float, workers: int, trials: int) -> tuple[Ends, Work, Parts]:
    """Ends of naps, seconds of work by layout, and CPU seconds of the study's process."""
    from workbench import ledger, scheduler, storage
    from workbench.executors.process import ProcessExecutor
    from workbench.guard import Guard
    from workbench.study import run_study
    from workbench.study_config import StudyConfig

    parts = Parts()
    for owner, name, part in (
        (storage, "ask", "ask the storage for a trial"),
        (scheduler.Scheduler, "_suggest", "draw a layout and store what was drawn"),
        (scheduler, "judge_static", "static stage"),
        (Guard, "renew", "watch plugins"),
        (Guard, "restore", "watch plugins"),
        (scheduler.Scheduler, "_claim", "claim and first records"),
        (ProcessExecutor, "submit", "start workers, hand trials over"),
        (ProcessExecutor, "wait", "hear of progress"),
        (ledger.Ledger, "finish", "last record"),
        (storage, "tell", "tell the storage"),
        (ledger.Ledger, "refresh", "look what other processes did"),
    ):
        parts.watch(owner, name, part)
    with tempfile.TemporaryDirectory(prefix="overhead-") as name:
        folder = Path(name)
        (folder / "plugins").mkdir()
        (folder / "plugins" / "naps.py").write_text(PLUGIN)
        done = run_study(
            StudyConfig.from_dict(study(folder, workers, nap, trials)), folder / "runs"
        )
        work = {
            trial.data["layout_hash"]: worked(trial.data["stage_seconds"])
            for trial in done.trials()
            if trial.outcome == "complete"
        }
        return read(folder / "naps.txt"), work, parts


def worked(stages: dict[str, float]) -> tuple[float, float]:
    """Seconds in stages that need a model: in the one that ends with the nap, and in later ones."""
    later = sum(seconds for stage, seconds in stages.items() if stage not in ("static", "measured"))
    return stages["measured"], later


def theirs(nap: float, workers: int, trials: int) -> tuple[Ends, Work]:
    """The same of Optuna's processes."""
    with tempfile.TemporaryDirectory(prefix="overhead-") as name:
        folder = Path(name)
        (folder / "plugins").mkdir()
        (folder / "plugins" / "naps.py").write_text(PLUGIN)
        make_naps(folder)  # first: processes that make the tables at once trip over each other
        command = [sys.executable, __file__, "--peer", name, str(nap), str(trials // workers)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        running = [subprocess.Popen(command, env=environment) for _ in range(workers)]
        assert [process.wait() for process in running] == [0] * workers
        ends = read(folder / "naps.txt")
    return ends, {key: (nap, 0.0) for naps in ends.values() for key, _ in naps}


def peer(folder: Path, nap: float, trials: int) -> None:
    """One of Optuna's processes."""
    import optuna

    from workbench.builder import default_builder
    from workbench.space import Space
    from workbench.storage import DEFAULT_ARGUMENTS
    from workbench.study_config import StudyConfig

    config = StudyConfig.from_dict(study(folder, 1, nap, trials))
    space = Space(config.space, default_builder(config.plugin_dirs), 16)
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        layout = space.suggest(trial)
        time.sleep(nap)
        with (folder / "naps.txt").open("a") as log:
            log.write(f"{os.getpid()} {trial.number} {time.monotonic()}\n")
        return 3.0 + 1 / layout.d_model, float(layout.d_model * len(layout.blocks))

    naps = make_naps(folder)
    naps.sampler = optuna.samplers.TPESampler(**DEFAULT_ARGUMENTS, seed=os.getpid())
    naps.optimize(objective, n_trials=trials)


def make_naps(folder: Path) -> Any:
    """Optuna's study of naps."""
    import optuna

    return optuna.create_study(
        study_name="naps",
        storage=f"sqlite:///{folder / 'optuna.db'}",
        directions=["minimize", "minimize"],
        load_if_exists=True,
    )


def read(path: Path) -> Ends:
    ends: Ends = defaultdict(list)
    for line in path.read_text().splitlines():
        process, key, moment = line.split()
        ends[int(process)].append((key, float(moment)))
    return ends


def overhead(ends: Ends, work: Work) -> tuple[int, float, float]:
    """Trials that count; seconds of work and of overhead of each, on average."""
    count, inside, beyond = 0, 0.0, 0.0
    for naps in ends.values():
        for (last, began), (key, ended) in itertools.pairwise(naps):
            seconds = work[last][1] + work[key][0]
            count += 1
            inside += seconds
            beyond += ended - began - seconds
    return count, inside / count, beyond / count


def row(words: str, ends: Ends, work: Work, target: str) -> str:
    count, inside, beyond = overhead(ends, work)
    share = beyond / inside
    return f"| {words} | {count} | {inside:.2f} | {beyond:.3f} | {share:.2%} | {target} |"


def print_tables(arguments: argparse.Namespace) -> None:
    from workbench.environment import package_versions, processor_name

    nap, trials = arguments.nap, arguments.trials
    ends, work, parts = ours(nap, WORKERS, trials)
    rows = [row(f"workbench, {WORKERS} workers, SQLite", ends, work, "≤ 0.3 s")]
    rows.append(row(f"optuna, {WORKERS} processes, SQLite", *theirs(nap, WORKERS, trials), ""))
    few = max(3, trials // WORKERS)
    rows.append(row("workbench, 1 worker", *ours(1.0, 1, few)[:2], ""))
    rows.append(row("optuna, 1 process", *theirs(1.0, 1, few), ""))
    if arguments.long:
        long = ours(LONG, 1, arguments.long)[:2]
        rows.append(row(f"workbench, 1 worker, {LONG:g} s", *long, "≤ 2 %"))
    versions = package_versions()
    names = ", ".join(f"{name} {versions[name]}" for name in ("torch", "optuna"))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{processor_name()}, {os.cpu_count()} cores, load {load}, {names}, ", end="")
    print(f"{datetime.now(UTC):%Y-%m-%d}\n")
    print("| run | trials | work (s) | overhead (s) | share | target |")
    print("|---|--:|--:|--:|--:|---|")
    print("\n".join(rows))
    print("\n| part of the study's process | CPU ms a trial |\n|---|--:|")
    for part, seconds in sorted(parts.seconds.items(), key=lambda item: -item[1]):
        print(f"| {part} | {1000 * seconds / trials:.1f} |")
    print(f"| all of these | {1000 * sum(parts.seconds.values()) / trials:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--nap", type=float, default=4.0)
    parser.add_argument("--long", type=int, default=3)
    parser.add_argument("--peer", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        folder, nap, trials = arguments.peer
        peer(Path(folder), float(nap), int(trials))
    else:
        print_tables(arguments)


if __name__ == "__main__":
    main()
