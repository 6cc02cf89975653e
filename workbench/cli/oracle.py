"""`workbench oracle`: how near a study's search came to the exhaustive truth about its space."""

from __future__ import annotations

import dataclasses
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli import interrupts
from workbench.cli.common import Column, Json, Runs, count, log, print_json, print_table, say
from workbench.cli.tables import front_columns

if TYPE_CHECKING:
    from workbench.enumeration import Enumeration
    from workbench.oracle import Oracle, Report
    from workbench.records import Study, Trial
    from workbench.study_config import StudyConfig

EXAMPLES = """\
  workbench oracle tiny --tabulate   judges what is not judged yet
  workbench oracle tiny --json       the regret after each evaluation"""

RESUME = "What was judged is recorded; the same command goes on with the rest."
SHARES = (0.1, 0.25, 0.5, 1.0)


def oracle(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="Name of a study.")],
    tabulate: Annotated[
        bool, typer.Option("--tabulate", help="Train every layout that is not judged yet.")
    ] = False,
    limit: Annotated[
        int, typer.Option(metavar="N", min=1, help="Refuse a space of more layouts.")
    ] = 500,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Layouts at a time; the study's if left out."),
    ] = None,
    runs: Runs = None,
    json: Json = False,
) -> None:
    """Compare a study's search with all of its space.

    Every layout of a small space is judged as the study judges its trials; then the search's
    hypervolume regret against the true Pareto front is shown, and what of that front it missed.
    """
    from workbench.oracle import Oracle, judged_trials, report
    from workbench.records import Study, load_study

    source = load_study(study, runs)
    config = _config(source, workers)
    judged_trials(source)  # before hours of training find nothing to be compared with
    where = "" if runs is None else f" --runs {shlex.quote(str(runs))}"
    with interrupts.explained(RESUME):
        found = Oracle(config, runs, limit, study=source.path)
        again = f"workbench oracle {shlex.quote(study)} --tabulate{where}"
        _complete(found, source, tabulate, again)
    truth = Study(found.folder)
    result = report(source, truth)
    if json:
        print_json(_data(source, truth, found.enumeration, result))
    else:
        more = f"workbench oracle {shlex.quote(study)} --json{where}"
        _show(source, truth, found.enumeration, result, more)


def _config(study: Study, workers: int | None) -> StudyConfig:
    """The study's, as it was started; its threads too, or losses would not compare."""
    from workbench.errors import WorkbenchError
    from workbench.study_config import StudyConfig

    name, separator, _ = study.name.rpartition("/oracle")
    if separator:
        raise WorkbenchError(f"{study.name} is the whole space of {name}: name the study itself.")
    if "config" not in study.data:
        raise WorkbenchError(f"{study.path / 'study.json'} is damaged: it lacks 'config'")
    config = StudyConfig.from_dict(study.data["config"])
    if workers is None:
        return config
    threads = config.runtime.threads or study.data.get("identity", {}).get("threads")
    runtime = dataclasses.replace(config.runtime, workers=workers, threads=threads)
    return dataclasses.replace(config, runtime=runtime)


def _complete(found: Oracle, study: Study, tabulate: bool, again: str) -> None:
    """Judge what is missing, if that is asked for.

    Args:
        again: the command that asks for it.
    """
    from workbench.cli.progress import RichReporter
    from workbench.errors import WorkbenchError

    missing = len(found.to_judge())
    if missing and not tabulate:
        total = count(len(found.enumeration.layouts), "layout")
        raise WorkbenchError(
            f"{missing:,} of {total} of study {study.name!r} are not judged yet. {again} "
            "takes over what the study judged, and trains the rest."
        )
    with RichReporter(log()) as reporter:
        found.tabulate(reporter)


def _milestones(result: Report) -> list[dict[str, Any]]:
    from workbench.regret import after

    regrets = [evaluation.regret for evaluation in result.evaluations]
    spent = [evaluation.trainings for evaluation in result.evaluations]
    numbers = list(range(1, len(regrets) + 1))
    return [
        {
            "share": share,
            "evaluations": int(after(share, numbers)),
            "trainings": after(share, spent),
            "regret": after(share, regrets),
        }
        for share in SHARES
    ]


def _data(study: Study, truth: Study, space: Enumeration, result: Report) -> dict[str, Any]:
    return {
        "study": study.name,
        "records": str(truth.path),
        "layouts": len(space.layouts),
        "combinations": space.suggestions,
        "duplicates": space.duplicates,
        "refused": space.refused,
        "outcomes": result.outcomes,
        "objectives": [dataclasses.asdict(objective) for objective in truth.objectives],
        "front": [trial.name for trial in result.front],
        "missed": [trial.name for trial in result.missed],
        "milestones": _milestones(result),
        "evaluations": [dataclasses.asdict(evaluation) for evaluation in result.evaluations],
    }


def _show(study: Study, truth: Study, space: Enumeration, result: Report, more: str) -> None:
    outcomes = ", ".join(
        f"{times} {name.replace('_', ' ')}" for name, times in result.outcomes.items()
    )
    layouts = count(len(space.layouts), "layout")
    say(
        f"Space of {study.name}: {layouts} ({outcomes}) from "
        f"{count(space.suggestions, 'combination')} of parameters; "
        f"{sum(space.refused.values()):,} cannot be built, {space.duplicates:,} are duplicates."
    )
    last = result.evaluations[-1]
    say(
        f"The search judged {count(len(result.evaluations), 'trial')}, for "
        f"{last.trainings:,.1f} whole trainings. Hypervolume regret (0%: the true front is found):"
    )
    print()
    rows = _milestones(result)
    shown = [
        Column(heading="of its trials", cells=[f"{r['share']:.0%}" for r in rows], right=True),
        Column(heading="trials", cells=[f"{r['evaluations']:,}" for r in rows], right=True),
        Column(heading="trainings", cells=[f"{r['trainings']:,.1f}" for r in rows], right=True),
        Column(heading="regret", cells=[f"{r['regret']:.2%}" for r in rows], right=True),
    ]
    print_table(shown, more)
    points = _points(truth, result.front)
    if not result.missed:
        say(f"It reached all {points} points of the true front.")
    else:
        missed = _points(truth, result.missed)
        say(f"Missed {missed} of {points} points of the true front; these layouts have them:")
        print()
        print_table(front_columns(truth, result.missed), more)
    say(f"Records: {truth.path}/ (a folder a layout, without weights)")


def _points(truth: Study, trials: list[Trial]) -> int:
    """How many different points they are: layouts may share their figures."""
    names = [objective.name for objective in truth.objectives]
    return len({tuple(trial.metrics[name] for name in names) for trial in trials})
