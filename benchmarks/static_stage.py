"""How many layouts a second the static stage judges on one core.

    python benchmarks/static_stage.py [STUDY.toml] [--layouts 5000]

Random suggestions of a study's space, each resolved, hashed, compared with those seen before, its
layers' construction checked once a kind, its static metrics computed and held against the study's
constraints: what a suggestion goes through before anything dear. Seconds are of this process's CPU
time, in one thread. `first` holds what is met for the first time: each kind of quantized block is
built once, without memory, to count its stored bytes. `in a study` is the same as a study does it:
it also watches what plugins do to what all share, suggesting and judging, and keeps what they print
apart.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from workbench.builder import default_builder
from workbench.environment import package_versions, processor_name
from workbench.errors import FieldError
from workbench.guard import guarded
from workbench.layout import Layout
from workbench.space import Space
from workbench.study_config import StudyConfig
from workbench.trial import Workplace, judge_static, static_figures
from workbench.verdict import InfeasibleError, Verdict

FIRST = 500  # layouts after which hardly any block is new


class Random:
    """Suggests as Optuna's random sampler does, without a storage."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._random.choice(choices)

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        return self._random.randrange(low, high + 1, step)

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None, log: bool
    ) -> float:
        return self._random.uniform(low, high)


class Screening:
    """Suggestions judged one after another; counts what became of them."""

    def __init__(self, place: Workplace, space: Space) -> None:
        self.place, self.space = place, space
        self.trial = Random(0)
        self.seen: set[str] = set()
        self.counts = dict.fromkeys(("new", "duplicate", "infeasible", "impossible"), 0)

    def suggest(self) -> Layout | None:
        try:
            return self.space.suggest(self.trial)
        except FieldError:
            return None

    def one_in_a_study(self, folder: Path) -> None:
        with guarded("a placement policy or layer", guard=self.place.guard):
            layout = self.suggest()
        if layout is not None:
            found = judge_static(self.place, layout, folder)
            assert found.outcome in ("complete", "infeasible"), found.reason

    def one(self) -> None:
        layout = self.suggest()
        if layout is None:
            self.counts["impossible"] += 1
            return
        self.counts["duplicate" if layout.hash in self.seen else "new"] += 1
        self.seen.add(layout.hash)
        # Duplicates too: what a layout costs is the question, not how few there are.
        try:
            static_figures(self.place, layout, Verdict())
        except InfeasibleError:
            self.counts["infeasible"] += 1


def rate(function: Any, count: int) -> float:
    """Calls a second of CPU time."""
    started = time.process_time()
    for _ in range(count):
        function()
    return count / (time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("study", nargs="?", type=Path, default=Path("studies/quickstart.toml"))
    parser.add_argument("--layouts", type=int, default=5000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = StudyConfig.read(arguments.study)
    builder = default_builder(config.plugin_dirs)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place = Workplace(config, builder, "cpu", folder)
        screening = Screening(place, Space(config.space, builder, place.data.vocab_size))
        rates = {
            f"first {FIRST}": rate(screening.one, FIRST),
            f"next {arguments.layouts}": rate(screening.one, arguments.layouts),
        }
        studied = arguments.layouts // 5
        rates[f"in a study, {studied} more"] = rate(
            lambda: screening.one_in_a_study(folder), studied
        )
    version = package_versions(("torch",))["torch"]
    print(f"{arguments.study}, {processor_name()}, torch {version}, {datetime.now(UTC):%Y-%m-%d}")
    print(", ".join(f"{count:,} {what}" for what, count in screening.counts.items()))
    print("\n| layouts | a second a core |\n|---|---:|")
    for name, found in rates.items():
        print(f"| {name} | {found:,.0f} |")


if __name__ == "__main__":
    main()
