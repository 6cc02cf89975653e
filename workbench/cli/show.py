"""`workbench show`: studies, one study, one trial."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli.common import Json, Runs, console, figure, print_json, table
from workbench.cli.tables import front_table, outcome_line, trial_table
from workbench.records import OUTCOMES, list_studies, load_study, load_trial, runs_folder

if TYPE_CHECKING:
    from workbench.records import Study, Trial

EXAMPLE = "Examples: workbench show · workbench show quickstart --all · workbench show quickstart:7"


def show(
    name: Annotated[str | None, typer.Argument(help="STUDY or STUDY:TRIAL; all studies.")] = None,
    all: Annotated[bool, typer.Option("--all", help="Every trial, not only the front.")] = False,
    runs: Runs = None,
    json: Json = False,
) -> None:
    """Show what studies found: all studies, a study's Pareto front, or one trial's record."""
    if name is None:
        _studies(runs, json)
    elif ":" in name:
        _trial(load_trial(name, runs), load_study(name.rpartition(":")[0], runs), json)
    else:
        _study(load_study(name, runs), all, json)


def _studies(runs: Runs, json: bool) -> None:
    studies = list_studies(runs)
    if json:
        print_json([study.summary() for study in studies])
        return
    if not studies:
        console().print(
            f"No studies in {runs_folder(runs).resolve()}. "
            "Start one: workbench run studies/quickstart.toml"
        )
        return
    rows = [
        [
            study.name,
            ", ".join(objective.name for objective in study.objectives),
            sum(study.summary()["outcomes"].values()),
            study.path,
        ]
        for study in studies
    ]
    console().print(table(None, ["study", "objectives", "trials", "folder"], rows))


def _study(study: Study, every: bool, json: bool) -> None:
    trials = study.trials() if every else study.front_trials()
    if json:
        front = [trial.number for trial in study.front_trials()]
        print_json({**study.summary(), "front": front, "records": [trial.data for trial in trials]})
        return
    out = console()
    out.print(outcome_line(study))
    out.print(trial_table(study, trials) if every else front_table(study, trials))


def _trial(trial: Trial, study: Study, json: bool) -> None:
    if json:
        layout = trial.layout.to_dict() if (trial.path / "layout.json").exists() else None
        print_json({**trial.data, "layout": layout, "path": str(trial.path)})
        return
    out = console()
    out.print(f"Trial {trial.name}: {trial.outcome} ({OUTCOMES[trial.outcome]})")
    if trial.reason:
        out.print(f"Reason: {trial.reason}")
    out.print(f"Pattern: {trial.pattern}")
    rows = [
        [name, figure(value, study.units.get(name, "")), study.units.get(name, "")]
        for name, value in trial.metrics.items()
    ]
    if rows:
        out.print(table(None, ["metric", "value", "unit"], rows))
    out.print(table(None, ["parameter", "value"], trial.params.items()))
    stages = trial.data.get("stage_seconds", {})
    if stages:
        out.print("Seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in stages.items()))
    environment = trial.environment
    if environment:
        versions = environment["versions"]
        out.print(
            f"Measured on {environment['device_name']} ({environment['device']}, "
            f"{environment['threads']} threads), torch {versions['torch']}, "
            f"lm-workbench {versions['lm-workbench']}"
        )
    out.print(f"Records: {trial.path}/")
