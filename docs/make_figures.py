"""Fills the README's figures from what was measured: nothing there is typed by hand.

    python docs/make_figures.py [quickstart] [cpu_scans] [startup]

`quickstart` reads runs/quickstart, which `make demo` leaves; the others run the
benchmark of that name and keep what it prints.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from workbench.cli.common import figure
from workbench.records import Study, load_study

ROOT = Path(__file__).parents[1]


def quickstart() -> str:
    """The Pareto front as Markdown, with where and when it was measured."""
    study = load_study("quickstart", ROOT / "runs")
    front = study.front_trials()
    names = [*dict.fromkeys([o.name for o in study.objectives] + list(study.units))]
    header = ["trial", "layout", "stored as", *names]
    lines = [_row(header), _row(["---"] * len(header))]
    for trial in front:
        figures = [figure(trial.metrics[name], study.units[name]) for name in names]
        stored = trial.params.get("quantizer", "none")
        lines.append(_row([str(trial.number), f"`{trial.pattern}`", stored, *figures]))
    return "\n".join([_caption(study), "", *lines])


def _caption(study: Study) -> str:
    trials = study.trials()
    facts = next(trial for trial in trials if trial.outcome == "complete").environment
    versions = facts["versions"]
    judged = sum(trial.outcome == "complete" for trial in trials)
    seconds = sum(trial.data["seconds"] for trial in trials)
    return (
        f"Front of {judged} judged trials in {seconds:.0f} s of trials: {facts['device_name']}, "
        f"{facts['threads']} thread, Python {facts['python']}, torch {versions['torch']}, "
        f"lm-workbench {versions['lm-workbench']}, {trials[0].data['started'][:10]}. "
        "Decode time is measured with random weights; parameters and bytes are exact."
    )


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def benchmark(name: str) -> str:
    """What `benchmarks/NAME.py` prints."""
    script = ROOT / "benchmarks" / f"{name}.py"
    done = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True)
    return f"`python benchmarks/{name}.py`\n\n{done.stdout.strip()}"


def main(names: list[str]) -> None:
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    for name in names or ["quickstart", "cpu_scans", "startup"]:
        made = quickstart() if name == "quickstart" else benchmark(name)
        pattern = re.compile(rf"(<!-- figures: {name} -->\n).*?(<!-- /figures -->)", re.DOTALL)
        text, count = pattern.subn(lambda m, made=made: f"{m[1]}{made}\n{m[2]}", text)
        if count != 1:
            sys.exit(f"README.md has no place for {name}")
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
