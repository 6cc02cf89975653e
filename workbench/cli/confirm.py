"""`workbench confirm`: train the finalists again with other seeds."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli import interrupts
from workbench.cli.common import Json, Runs, as_options, log, print_json, print_table, say
from workbench.cli.confirmed import confirmed_columns, confirmed_lines
from workbench.errors import FieldError
from workbench.records import load_study

if TYPE_CHECKING:
    from workbench.records import Study

EXAMPLES = """\
  workbench confirm quickstart                the front, two more seeds each
  workbench confirm quickstart --seeds 5
  workbench confirm quickstart --trials 3,7   these trials alone"""

RESUME = "What was trained is recorded; the same command goes on from there."


def confirm(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="Its name.")],
    seeds: Annotated[
        int, typer.Option(metavar="N", help="Trainings a finalist, the search's own included.")
    ] = 3,
    trials: Annotated[
        str | None,
        typer.Option(metavar="N,M", help="The finalists; the Pareto front if left out."),
    ] = None,
    executor: Annotated[
        str | None,
        typer.Option(metavar="WHERE", help="process, ray or inline; the study's if left out."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Trainings at a time; the study's if left out.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Of a Ray cluster; the study's if left out."),
    ] = None,
    runs: Runs = None,
    json: Json = False,
) -> None:
    """Train the finalists again with other seeds.

    Gives each objective of training a mean and a 95 % interval, and says which points these do not
    tell apart. What is on record is not trained again.
    """
    if seeds < 2:
        raise FieldError("--seeds", f"must be at least 2 (the search's own is one), got {seeds}")
    given = {"executor": executor, "workers": workers, "address": address}
    runtime = {name: value for name, value in given.items() if value is not None}
    numbers, console = _numbers(trials), log()
    from workbench.confirm import changed_runtime
    from workbench.confirm import confirm as train

    with as_options():
        changed_runtime(load_study(study, runs), runtime)
    with interrupts.explained(RESUME):
        done = train(study, runs, seeds=seeds, trials=numbers, runtime=runtime, say=console.print)
    if json:
        print_json([one.to_dict() for one in done.confirmed()])
    else:
        where = "" if runs is None else f" --runs {shlex.quote(str(runs))}"
        _report(done, f"workbench show {shlex.quote(study)}{where}")


def _numbers(trials: str | None) -> tuple[int, ...]:
    parts = [] if trials is None else [part.strip() for part in trials.split(",")]
    if not all(part.isdigit() for part in parts):
        raise FieldError("--trials", f"expected numbers such as 3,7, got {trials!r}")
    return tuple(map(int, parts))


def _report(study: Study, again: str) -> None:
    """Print the means.

    Args:
        again: the command that shows them.
    """
    points = study.confirmed()
    trials = [study.trial(point.number) for point in points]
    say(f"Confirmed of study {study.name}: {', '.join(str(point.number) for point in points)}")
    print()
    print_table(confirmed_columns(study, trials, points), f"{again} --json")
    for line in confirmed_lines(trials, points):
        say(line)
    print("Next:")
    print(f"  {again}")
