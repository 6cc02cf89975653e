"""`workbench run`: run or resume a study."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli.common import Json, PluginDirs, Runs, console, print_json
from workbench.cli.tables import front_table, outcome_line

if TYPE_CHECKING:
    from rich.console import Console

    from workbench.records import Study

EXAMPLE = "Example: workbench run studies/quickstart.toml --trials 40"


def run(
    study: Annotated[Path, typer.Argument(help="The study's TOML file.")],
    trials: Annotated[int | None, typer.Option(help="Judged trials to reach.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    executor: Annotated[str | None, typer.Option(help="process or inline.")] = None,
    runs: Runs = None,
    plugin_dir: PluginDirs = None,
    json: Json = False,
) -> None:
    """Run a study, or resume it: search layouts, train them, keep the Pareto front.

    Ctrl-C is safe at any moment; the same command goes on from there.
    """
    from workbench.study_config import StudyConfig

    config = StudyConfig.read(study)
    config = _overridden(config, trials, device, executor, plugin_dir)
    with_progress = console(stderr=True)
    from workbench.cli.progress import RichReporter
    from workbench.study import run_study

    with RichReporter(with_progress) as reporter:
        result = run_study(config, runs, reporter)
    if json:
        print_json({**result.summary(), "front": [t.name for t in result.front_trials()]})
    else:
        _report(result, console())


def _overridden(
    config: Any,
    trials: int | None,
    device: str | None,
    executor: str | None,
    plugin_dir: list[Path] | None,
) -> Any:
    budget = {} if trials is None else {"trials": trials}
    runtime = {name: value for name, value in (("device", device), ("executor", executor)) if value}
    folders = tuple(str(folder.resolve()) for folder in plugin_dir or ())
    return dataclasses.replace(
        config,
        budget=dataclasses.replace(config.budget, **budget),
        runtime=dataclasses.replace(config.runtime, **runtime),
        plugin_dirs=(*config.plugin_dirs, *folders),
    )


def _report(study: Study, out: Console) -> None:
    front = study.front_trials()
    out.print(outcome_line(study))
    if not front:
        out.print("No trial is complete: `workbench show` says what became of each.")
        return
    out.print(front_table(study, front))
    best = front[0].name
    out.print(f"Records: {study.path}/ (a folder a trial: layout, metrics, curve, weights)")
    out.print("Next:")
    out.print(f"  workbench show {best}")
    out.print(f"  workbench dashboard {study.name}")
    out.print(f"  workbench generate {best} --prompt 'def main('")
    out.print(f"  workbench export {best} exported/{study.name}-{front[0].number}")
