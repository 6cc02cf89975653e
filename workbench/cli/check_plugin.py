"""`workbench check-plugin`: the contract suites on a package, and what its author must change."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli.common import (
    Column,
    Json,
    PluginDirs,
    builder,
    count,
    print_json,
    print_table,
    say,
)

if TYPE_CHECKING:
    from workbench.testing.checking import Check, Subject

EXAMPLES = """\
  workbench check-plugin my-mixer
  workbench check-plugin my_layers/token_shift.py --only causality
  workbench check-plugin mamba --only 'gradients or costs' --json"""
FAILED = 1


def check_plugin(
    package: Annotated[
        str, typer.Argument(metavar="PACKAGE", help="Installed package, plugin, or a .py file.")
    ],
    only: Annotated[
        str | None,
        typer.Option(metavar="WORDS", help="Checks or things with it in their name; and, or, not."),
    ] = None,
    tests: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Test file whose suites are taken; repeatable."),
    ] = None,
    plugin_dir: PluginDirs = None,
    json: Json = False,
) -> None:
    """Check that what a plugin offers keeps its contracts.

    Runs the contract suite of each layer, placement, quantizer, metric, data source, exporter and
    preset that it registers, with configs derived from defaults and search ranges, or with those
    of suites in its own tests. Exit status 1 if a check failed.
    """
    from workbench.testing.checking import own_tests, run_checks

    subject = _subject(package, plugin_dir or [])
    started = time.monotonic()
    checks = run_checks(subject, tests or own_tests(subject), only)
    seconds = time.monotonic() - started
    failed = [check for check in checks if check.outcome == "failed"]
    if json:
        print_json(_report(subject, checks, seconds))
    else:
        _print(subject, checks, failed, seconds)
    if failed:
        raise typer.Exit(FAILED)


def _subject(package: str, plugin_dirs: list[Path]) -> Subject:
    from workbench.errors import WorkbenchError
    from workbench.testing.checking import distribution_of, find_subject

    path = Path(package)
    if path.suffix == ".py":
        if not path.is_file():
            raise WorkbenchError(f"{package}: no such file")
        package, plugin_dirs = path.stem, [*plugin_dirs, path.resolve().parent]
    elif (path / "pyproject.toml").is_file():
        package = distribution_of(path)
    folders = [str(folder.resolve()) for folder in plugin_dirs]
    return find_subject(package, builder(plugin_dirs), folders)


def _report(subject: Subject, checks: Sequence[Check], seconds: float) -> dict[str, Any]:
    outcomes = [check.outcome for check in checks]
    return {
        "package": subject.name,
        "plugins": list(subject.plugins),
        "seconds": round(seconds, 3),
        **{outcome: outcomes.count(outcome) for outcome in ("passed", "failed", "skipped")},
        "checks": [dataclasses.asdict(check) for check in checks],
    }


def _print(
    subject: Subject, checks: Sequence[Check], failed: Sequence[Check], seconds: float
) -> None:
    def key(check: Check) -> tuple[str, str]:
        return check.thing, check.check

    rows = [list(group) for _, group in groupby(checks, key)]
    things = [row[0].thing for row in rows]
    shown = [thing if thing != before else "" for thing, before in zip(things, ["", *things])]  # noqa: B905
    if rows:
        print_table(
            [
                Column(heading="thing", cells=shown),
                Column(heading="check", cells=[row[0].check.replace("_", " ") for row in rows]),
                Column(heading="outcome", cells=[_outcome(row) for row in rows]),
                Column(
                    heading="seconds",
                    cells=[f"{sum(check.seconds for check in row):.1f}" for row in rows],
                    right=True,
                ),
            ]
        )
    for (_, _), group in groupby(failed, key):
        _print_failure(list(group))
    for check in checks:
        if check.outcome == "skipped":
            say(f"{check.thing} was not checked: {check.message}\n  Mend: {check.mend}\n")
    if not checks:
        say(f"{subject.name} registers nothing: a hook must call register(name, thing).")
    passed = sum(check.outcome == "passed" for check in checks)
    skipped = len(checks) - passed - len(failed)
    say(
        f"{subject.name}: {count(passed, 'check')} passed, {len(failed)} failed, "
        f"{skipped} skipped in {seconds:.0f} s"
    )


def _outcome(row: Sequence[Check]) -> str:
    failed = sum(check.outcome == "failed" for check in row)
    if failed:
        return f"FAILED {failed} of {len(row)}" if len(row) > 1 else "FAILED"
    return row[0].outcome


def _print_failure(checks: Sequence[Check]) -> None:
    """The first failure of a check; the others fail alike, with other configs."""
    first = checks[0]
    case = f" [{first.case}]" if first.case else ""
    say(f"{first.thing}: {first.check.replace('_', ' ')}{case} FAILED")
    say(f"  must hold: {first.holds}")
    say(f"  found:     {first.message}")
    if first.file:
        say(f"  look at:   {first.file}:{first.line}")
    say(f"  mend:      {first.mend}")
    if len(checks) > 1:
        say(f"  also with: {'; '.join(check.case for check in checks[1:])}")
    print()
