"""A study on two Ray nodes of this machine, of which one is killed in its middle.

    python benchmarks/ray_node.py [--trials 12]

The cluster is Ray's own `cluster_utils.Cluster`: two nodes of one slot. The second is killed,
without grace, when the third trial trains. Prints what became of the trials: `lost` are those that
the study has no record of, or whose parameters never ran again; `duplicated` are layouts trained to
the end more than once; `disagreeing` are trials of which Optuna's storage says other than their
record. The seconds are those from the node's death to the study's end.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import os
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import ray  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from tests.workbench.conftest import STUDY, make_config  # noqa: E402
from tests.workbench.studies import assert_all_accounted_for  # noqa: E402
from tests.workbench.test_study_faults import slow  # noqa: E402
from workbench.environment import processor_name  # noqa: E402
from workbench.records import Study, Trial  # noqa: E402
from workbench.reporter import Reporter  # noqa: E402
from workbench.study import run_study  # noqa: E402

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
BEFORE = 3  # trials in training when the node goes


class Killer(Reporter):
    """Kills a node once enough trials have trained."""

    def __init__(self, cluster: Any, node: Any) -> None:
        self.cluster, self.node = cluster, node
        self.seen: set[int] = set()
        self.killed_at: float | None = None

    def trial_progress(self, number: int, step: int, steps: int, loss: float) -> None:
        self.seen.add(number)
        if len(self.seen) == BEFORE and self.killed_at is None:
            self.killed_at = time.monotonic()
            self.cluster.remove_node(self.node, allow_graceful=False)


def disturbed(runs: Path, trials: int) -> tuple[Study, float]:
    """The study, and the seconds from the node's death to its end."""
    data = slow(copy.deepcopy(STUDY))
    data["training"]["tokens"] = 64 * 40
    data["space"]["d_model"] = list(range(8, 72, 4))
    data["runtime"].update(executor="ray", threads=1)
    data["budget"].update(trials=trials, retries=2)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    head = {**NODE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        killer = Killer(cluster, cluster.add_node(**NODE))
        cluster.wait_for_nodes()
        data["runtime"]["address"] = cluster.address
        study = run_study(make_config(data), runs, killer)
    finally:
        ray.shutdown()
        cluster.shutdown()
    if killer.killed_at is None:
        raise SystemExit("the study ended before the node was killed: give it more trials")
    return study, time.monotonic() - killer.killed_at


def lost(trials: list[Trial]) -> int:
    """Trials that went with the node and never ran again, and numbers without a record."""
    again = Counter(trial.data["retry_of"] for trial in trials)
    gone = [trial for trial in trials if trial.outcome == "crashed"]
    missing = set(range(len(trials))) - {trial.number for trial in trials}
    return sum(again[trial.number] != 1 for trial in gone) + len(missing)


def disagreeing(study: Study) -> str:
    try:
        assert_all_accounted_for(study)
    except (AssertionError, KeyError) as error:
        return f"some: {error}"
    return "0"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=12, help="of the study")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ray-node-") as folder:
        study, seconds = disturbed(Path(folder), arguments.trials)
        trials = study.trials()
        outcomes = Counter(trial.outcome for trial in trials)
        layouts = Counter(t.data["layout_hash"] for t in trials if t.outcome == "complete")
        duplicated = sum(count - 1 for count in layouts.values())
        versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("ray", "optuna"))
        print(f"{processor_name()}, {versions}, {datetime.now(UTC):%Y-%m-%d}\n")
        print(
            "| wanted | complete | went with the node | lost | duplicated | disagreeing | seconds |"
        )
        print("|--:|--:|--:|--:|--:|--:|--:|")
        print(
            f"| {arguments.trials} | {outcomes['complete']} | {outcomes['crashed']} "
            f"| {lost(trials)} | {duplicated} | {disagreeing(study)} | {seconds:.0f} |"
        )


if __name__ == "__main__":
    main()
