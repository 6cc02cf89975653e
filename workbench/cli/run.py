"""`workbench run`: run or resume a study."""

from __future__ import annotations

import dataclasses
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli import interrupts
from workbench.cli.common import (
    Json,
    PluginDirs,
    Runs,
    as_options,
    builder,
    log,
    print_json,
    print_table,
    prompt_of,
    say,
)
from workbench.cli.tables import front_columns, front_line, outcome_line

if TYPE_CHECKING:
    from workbench.records import Study
    from workbench.study_config import StudyConfig

EXAMPLES = """\
  workbench run studies/quickstart.toml
  workbench run studies/quickstart.toml --trials 40   go on to 40 trials
  workbench run studies/hybrid_gpu.toml --workers 2   two trials at a time"""

RESUME = "What was found is recorded; the same command goes on from there."


def run(
    study: Annotated[Path, typer.Argument(metavar="STUDY.toml", help="The study's file.")],
    trials: Annotated[
        int | None,
        typer.Option(metavar="N", help="Judged trials to reach; the file's if left out."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")
    ] = None,
    executor: Annotated[
        str | None,
        typer.Option(metavar="WHERE", help="process (here), ray (a cluster) or inline (to debug)."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", help="Trials at a time; 1 on a CPU, else one a device."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Of a Ray cluster: auto, host:port, ray://…"),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Of Optuna's storage; WORKBENCH_STORAGE, else SQLite."),
    ] = None,
    runs: Runs = None,
    plugin_dir: PluginDirs = None,
    json: Json = False,
) -> None:
    """Run or resume a study, and show its Pareto front.

    Suggests layouts, judges each from cheap to dear and records it. Ctrl-C is safe at any moment;
    the same command goes on from there.
    """
    from workbench.study_config import StudyConfig

    _refuse_missing(study)
    runtime = {"device": device, "executor": executor, "workers": workers, "address": address}
    config = _overridden(StudyConfig.read(study), trials, runtime, plugin_dir)
    from workbench.cli.progress import RichReporter
    from workbench.study import run_study

    builder(map(Path, config.plugin_dirs))  # imports while Ctrl-C may still simply end them
    with interrupts.explained(RESUME), _in_file(study), RichReporter(log()) as reporter:
        result = run_study(config, runs, reporter, storage)
    if json:
        print_json({**result.summary(), "front": [t.name for t in result.front_trials()]})
    else:
        _report(result, config, "" if runs is None else f" --runs {shlex.quote(str(runs))}")


@contextmanager
def _in_file(path: Path) -> Iterator[None]:
    """Inside, an error in a name or a field also names the file that holds it."""
    from workbench.errors import FieldError, UnknownNameError, WorkbenchError

    try:
        yield
    except (FieldError, UnknownNameError) as error:
        if isinstance(error, FieldError) and error.field.startswith("--"):
            raise  # an option's, which no file holds
        raise WorkbenchError(f"{path}: {error}") from None


def _refuse_missing(path: Path) -> None:
    from workbench.errors import WorkbenchError

    if path.exists():
        return
    folders = dict.fromkeys((path.parent, Path(), Path("studies")))
    there = [file for folder in folders for file in folder.glob("*.toml") if _holds_study(file)]
    near = get_close_matches(path.stem, [file.stem for file in there], n=1)
    meant = [str(file) for file in there if file.stem in near]
    raise WorkbenchError(
        f"there is no study file {path}."
        + (f" Did you mean {meant[0]}?" if meant else "")
        + (f" Known: {', '.join(sorted(map(str, there)))}." if there else "")
    )


def _holds_study(path: Path) -> bool:
    """Whether a TOML file has what only a study has."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return False
    return "space" in data and "objectives" in data


def _overridden(
    config: StudyConfig,
    trials: int | None,
    runtime: Mapping[str, Any],
    plugin_dir: list[Path] | None,
) -> StudyConfig:
    """The study with what the command line says otherwise."""
    from workbench.environment import resolve_device
    from workbench.errors import FieldError

    if trials is not None and trials < 1:
        raise FieldError("--trials", f"must be at least 1, got {trials}")
    budget: dict[str, Any] = {} if trials is None else {"trials": trials}
    given = {name: value for name, value in runtime.items() if value is not None}
    if given.get("executor", "ray") != "ray":
        given = {"address": None, **given}  # the cluster's, which is not asked
    with as_options():
        if "device" in given:
            resolve_device(given["device"])
        changed = dataclasses.replace(config.runtime, **given)
    folders = tuple(str(folder.resolve()) for folder in plugin_dir or ())
    return dataclasses.replace(
        config,
        budget=dataclasses.replace(config.budget, **budget),
        runtime=changed,
        plugin_dirs=(*config.plugin_dirs, *folders),
    )


def _report(study: Study, config: StudyConfig, where: str) -> None:
    from workbench.export import tokenizer_of

    front = study.front_trials()
    say(outcome_line(study))
    if not front:
        say(f"No trial is complete: workbench show {study.name} --all{where} says why.")
        return
    say(front_line(study, front))
    print()
    print_table(front_columns(study, front), f"workbench show {study.name} --json{where}")
    say(f"Records: {study.path}/ (a folder a trial: layout, metrics, curve, weights)")
    best = front[0]
    print("Next:")
    print(f"  workbench show {best.name}{where}")
    print(f"  workbench dashboard {study.name}{where}")
    if tokenizer_of(config) is not None:  # a synthetic task has no text to continue
        print(f"  workbench generate {best.name} --prompt {prompt_of(config)!r}{where}")
    print(f"  workbench export {best.name} exported/{study.name}-{best.number}{where}")
