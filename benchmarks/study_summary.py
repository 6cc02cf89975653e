"""What a study came to, as markdown to be committed: outcomes, where its time went, its front.

    python benchmarks/study_summary.py RUNS STUDY

Reads records alone. Wall time goes from the start of the first trial to the end of the last, so a
study that was stopped and resumed counts its pause, too; the sum over trials does not.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
from collections import Counter
from collections.abc import Sequence

from workbench.errors import WorkbenchError
from workbench.figures import figure
from workbench.records import Study, Trial, load_study

STAGES = ("static", "measured", "synthetic", "training", "trained", "quantized")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a markdown table, the first column to the left, the others to the right."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _moment(trial: Trial) -> float:
    return datetime.datetime.fromisoformat(trial.data["started"]).timestamp()


def wall_seconds(trials: Sequence[Trial]) -> float:
    """From the start of the first trial to the end of the last."""
    spans = [
        (_moment(trial), float(trial.data["seconds"]))
        for trial in trials
        if "started" in trial.data and trial.data.get("seconds") is not None
    ]
    if not spans:
        return 0.0
    return max(start + seconds for start, seconds in spans) - min(start for start, _ in spans)


def heading(study: Study, trials: Sequence[Trial], complete: Sequence[Trial]) -> list[str]:
    """What ran where and when, how many trials came of it, and how fast."""
    facts = complete[0].environment
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v)
    outcomes = Counter(trial.outcome for trial in trials)
    counts = ", ".join(f"{number} {name}" for name, number in outcomes.most_common())
    wall = wall_seconds(trials)
    spent = sum(trial.data.get("seconds") or 0.0 for trial in trials)
    rate = f"{60 * len(complete) / wall:.2f} complete trials a minute" if wall else ""
    return [
        f"## {study.name}",
        "",
        str(study.data.get("description", "")),
        "",
        f"{trials[0].data['started'][:10]}, {facts['device_name']} ({facts['device']}), "
        f"{facts['cores']} cores, Python {facts['python']}, {versions}",
        "",
        f"{len(trials)} suggestions: {counts}. {wall:,.0f} s by the clock ({spent:,.0f} s in "
        f"trials), {rate}.",
    ]


def stage_lines(complete: Sequence[Trial]) -> list[str]:
    """Where the time of complete trials went: the stages, what compiling took of them, the rest."""
    seconds: dict[str, list[float]] = {}
    for trial in complete:
        stages = trial.data.get("stage_seconds", {})
        for stage in STAGES:
            if stage in stages:
                seconds.setdefault(stage, []).append(stages[stage])
        details = trial.data.get("details", {})
        for stage, spent in details.get("preparing_seconds", {}).items():
            seconds.setdefault(f"of {stage}: compiling, capturing", []).append(spent)
        rest = trial.data["seconds"] - sum(stages.values())
        seconds.setdefault("between (worker's start, records)", []).append(rest)
    rows = [
        [
            name,
            *(f"{value:,.2f}" for value in (statistics.median(spent), max(spent))),
            f"{sum(spent):,.0f}",
        ]
        for name, spent in seconds.items()
    ]
    return table(("seconds a complete trial", "median", "most", "all"), rows)


def front_lines(study: Study, complete: Sequence[Trial]) -> list[str]:
    """The Pareto front by the first objective: every metric, training rate, pattern."""
    front = study.front_trials()
    objectives = [objective.name for objective in study.objectives]
    others = [name for name in study.units if name not in objectives]
    heads = [
        "trial",
        *(f"{name} [{study.units[name]}]" for name in (*objectives, *others)),
        *("d_model", "training tokens/s", "pattern"),
    ]
    rows = []
    for trial in front:
        cells = [figure(trial.metrics.get(n), study.units[n]) for n in (*objectives, *others)]
        width = str(trial.layout.d_model)
        rows.append([str(trial.number), *cells, width, training_rate(trial), f"`{trial.pattern}`"])
    return [
        f"Front of {', '.join(objectives)}: {len(front)} of {len(complete)} complete trials.",
        "",
        *table(heads, rows),
    ]


def training_rate(trial: Trial) -> str:
    """Training tokens a second, by the seconds that compiling is not in; a dash if not known."""
    curve = trial.curve()
    if len(curve) < 2:
        return figure(None)
    first, last = curve.iloc[0], curve.iloc[-1]
    spent = last["seconds"] - first["seconds"]
    return f"{(last['tokens'] - first['tokens']) / spent:,.0f}" if spent > 0 else figure(None)


def summary(study: Study) -> str:
    """The whole page.

    Raises:
        WorkbenchError: no trial is complete.
    """
    trials = study.trials()
    complete = [trial for trial in trials if trial.outcome == "complete"]
    if not complete:
        raise WorkbenchError(
            f"no trial of {study.name} is complete: workbench show {study.name} --all says why"
        )
    return "\n".join(
        [
            *heading(study, trials, complete),
            "",
            *stage_lines(complete),
            "",
            *front_lines(study, complete),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", help="folder of all studies")
    parser.add_argument("study", help="its name")
    options = parser.parse_args()
    try:
        print(summary(load_study(options.study, options.runs)))
    except WorkbenchError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
