"""`workbench migrate`: begin a study with a larger space with an old one's trials."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated

import typer

from workbench.cli.common import Json, PluginDirs, Runs, count, print_json, say

EXAMPLES = """\
  workbench migrate quickstart larger.toml   begins with quickstart's trials"""


def migrate(
    old: Annotated[str, typer.Argument(metavar="OLD", help="The study that has the trials.")],
    study: Annotated[Path, typer.Argument(metavar="NEW.toml", help="The new study's file.")],
    storage: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Of the new one's storage, as for workbench run."),
    ] = None,
    runs: Runs = None,
    plugin_dir: PluginDirs = None,
    json: Json = False,
) -> None:
    """Copy finished trials to a study whose space grew.

    The new file offers what the old one did and more; data, objectives, constraints, training and
    seed are the same. Trials that the new space cannot suggest are left out, and counted.
    """
    from workbench.migrate import migrate as migrated
    from workbench.study_config import StudyConfig

    config = StudyConfig.read(study)
    folders = tuple(str(folder.resolve()) for folder in plugin_dir or ())
    config = dataclasses.replace(config, plugin_dirs=(*config.plugin_dirs, *folders))
    done = migrated(old, config, runs, storage)
    if json:
        print_json(
            {
                **done.study.summary(),
                "migrated": {str(before): after for before, after in done.numbers.items()},
                "left_out": done.left_out,
            }
        )
        return
    say(f"{count(len(done.numbers), 'trial')} of {old} copied to {done.study.path}/.")
    for reason, times in done.left_out.items():
        say(f"  {count(times, 'trial')} left out: {reason}")
    where = "" if runs is None else f" --runs {shlex.quote(str(runs))}"
    print("Next:")
    print(f"  workbench show {done.study.name}{where}")
    again = [f"--plugin-dir {shlex.quote(str(folder))}" for folder in plugin_dir or ()]
    if storage is not None:
        again.append("--storage URL")  # it may hold a password
    print(f"  workbench run {' '.join([shlex.quote(str(study)), *again])}{where}")
