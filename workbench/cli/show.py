"""`workbench show`: studies, one study, one trial."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli.common import Json, Runs, count, print_json, print_table, say, warn
from workbench.cli.confirmed import confirmed_columns, confirmed_lines
from workbench.cli.tables import (
    front_line,
    funnel_columns,
    outcome_line,
    study_columns,
    trial_columns,
)
from workbench.errors import FieldError
from workbench.figures import figure
from workbench.funnel import study_funnel
from workbench.records import OUTCOMES, load_study, load_trial, read_studies, runs_folder
from workbench.text_table import Column

if TYPE_CHECKING:
    from workbench.records import Study, Trial

EXAMPLES = """\
  workbench show                       all studies
  workbench show quickstart            its Pareto front
  workbench show quickstart --all      every trial
  workbench show quickstart --funnel   what became of trials, stage by stage
  workbench show quickstart:7 --json   one trial's record, as JSON"""


def show(
    name: Annotated[
        str | None,
        typer.Argument(metavar="STUDY[:TRIAL]", help="All studies if left out."),
    ] = None,
    all: Annotated[bool, typer.Option("--all", help="Every trial, not only the front.")] = False,
    funnel: Annotated[
        bool, typer.Option("--funnel", help="How many trials entered and left each stage.")
    ] = False,
    runs: Runs = None,
    json: Json = False,
) -> None:
    """Show all studies, a study's Pareto front, or one trial."""
    if funnel and (name is None or ":" in name):
        raise FieldError("--funnel", "is of a whole study: workbench show STUDY --funnel")
    if name is None:
        _studies(runs, json)
    elif ":" in name:
        trial = load_trial(name, runs)
        _trial(trial, load_study(name.rpartition(":")[0], runs), json)
    else:
        _study(load_study(name, runs), all, funnel, json)


def _studies(runs: Runs, json: bool) -> None:
    studies, damaged = read_studies(runs)
    for message in damaged:
        warn(message)
    if json:
        print_json([study.summary() for study in studies])
    elif studies:
        print_table(study_columns(studies))
        say(f"Next: workbench show {studies[0].name}")
    else:
        say(f"No studies in {runs_folder(runs).resolve()}.")
        say("Start one: workbench run studies/quickstart.toml")


def _study(study: Study, every: bool, funnel: bool, json: bool) -> None:
    front = study.front_trials()
    trials = study.trials() if every else front
    confirmed = study.confirmed()
    if json:
        numbers = [trial.number for trial in front]
        records = [trial.data for trial in trials]
        stages = {"funnel": [stage.to_dict() for stage in study_funnel(study)]} if funnel else {}
        again = {"confirmed": [point.to_dict() for point in confirmed]} if confirmed else {}
        print_json({**study.summary(), "front": numbers, "records": records, **again, **stages})
        return
    say(outcome_line(study))
    if funnel:
        print()
        print_table(funnel_columns(study_funnel(study)))
        return
    if not trials:
        say("No trial is complete yet." if study.trials() else "It holds no trials yet.")
    elif every:
        print()
        print_table(trial_columns(study, trials))
    else:
        say(front_line(study, trials))
        print()
        print_table(confirmed_columns(study, trials, confirmed))
        for line in confirmed_lines(trials, confirmed):
            say(line)
    if front:
        say(f"Next: workbench show {front[0].name}")
    elif trials:
        say(f"Next: workbench show {trials[-1].name} says why it is {_words(trials[-1])}.")
    elif study.trials():
        say(f"Next: workbench show {study.name} --all says why.")


def _trial(trial: Trial, study: Study, json: bool) -> None:
    if json:
        layout = trial.layout.to_dict() if (trial.path / "layout.json").exists() else None
        print_json({**trial.data, "layout": layout, "path": str(trial.path)})
        return
    say(f"Trial {trial.name}: {_words(trial)} ({OUTCOMES[trial.outcome]})")
    if trial.reason:
        say(f"Reason: {trial.reason}")
    if trial.pattern:
        say(f"Pattern: {trial.pattern}")
    print()
    if trial.metrics:
        print_table(_metric_columns(trial, study))
    if trial.params:
        values = [str(value) for value in trial.params.values()]
        print_table(
            [
                Column(heading="searched", cells=list(trial.params)),
                Column(heading="value", cells=values, fit="wrap"),
            ]
        )
    for rung in trial.data.get("rungs", ()):
        say(_rung_line(rung, study))
    stages = trial.data.get("stage_seconds", {})
    if stages:
        say("Seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in stages.items()))
    if trial.environment:
        say(_measured_on(trial))
    say(f"Records: {trial.path}/")


def _words(trial: Trial) -> str:
    return trial.outcome.replace("_", " ")


def _metric_columns(trial: Trial, study: Study) -> list[Column]:
    """Objectives first; figures as people read them, and the unit they were recorded in."""
    objectives = {objective.name: objective for objective in study.objectives}
    names = [name for name in objectives if name in trial.metrics]
    names += [name for name in trial.metrics if name not in objectives]
    units = [study.units.get(name, "") for name in names]
    figures = [figure(trial.metrics[name], unit) for name, unit in zip(names, units, strict=True)]
    goals = [objectives[name].direction if name in objectives else "" for name in names]
    return [
        Column(heading="metric", cells=names),
        Column(heading="value", cells=figures, right=True),
        Column(heading="unit", cells=units),
        Column(heading="objective", cells=goals),
    ]


def _rung_line(rung: dict[str, Any], study: Study) -> str:
    figures = ", ".join(
        f"{name} {figure(value, study.units.get(name, ''))}"
        for name, value in rung["metrics"].items()
    )
    decision = "stopped" if rung["decision"] == "stop" else "went on"
    return f"Rung at step {rung['step']:,} ({rung['share']:.0%}): {figures}; {decision}"


def _measured_on(trial: Trial) -> str:
    facts = trial.environment
    versions = facts["versions"]
    return (
        f"Measured on {facts['device_name']} ({facts['device']}, "
        f"{count(facts['threads'], 'thread')}), torch {versions['torch']}, "
        f"lm-workbench {versions['lm-workbench']}"
    )
