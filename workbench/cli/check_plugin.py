"""`workbench check-plugin`: the contract suites on a package, and what its author must change."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli import interrupts
from workbench.cli.common import (
    Column,
    Json,
    PluginDirs,
    as_options,
    count,
    print_json,
    print_table,
    say,
)

if TYPE_CHECKING:
    from workbench.testing.subject import Check, Subject

EXAMPLES = """\
  workbench check-plugin my-mixer
  workbench check-plugin my_layers/token_shift.py --only causality
  workbench check-plugin my-mixer --timeout 600
  workbench check-plugin mamba --only 'gradients or costs' --json"""
FAILED = 1
TIMEOUT = 120.0


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
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="Of one check; one that takes longer failed.")
    ] = TIMEOUT,
    plugin_dir: PluginDirs = None,
    json: Json = False,
) -> None:
    """Check that what a plugin offers keeps its contracts.

    Runs the contract suite of each layer, placement, quantizer, metric, data source, exporter and
    preset that it registers, with configs derived from defaults and search ranges, or with those
    of suites in its own tests. All of it happens in a process of its own: a check that ends that
    process, or hangs, has failed, and the rest run in another. Exit status 1 if a check failed.
    """
    from workbench.testing.checking import check_package

    _refuse_no_time(timeout)
    name, folders = _named(package, plugin_dir or [])
    started = time.monotonic()
    with interrupts.explained("No results are kept; --only runs fewer checks."):
        report = check_package(
            name, plugin_dirs=folders, tests=tests or (), only=only, timeout=timeout
        )
    seconds = time.monotonic() - started
    subject, checks = report.subject, report.checks
    failed = [check for check in checks if check.outcome == "failed"]
    if json:
        print_json(_report(subject, checks, seconds))
    else:
        _print(subject, checks, failed, seconds)
    if failed:
        raise typer.Exit(FAILED)


def _refuse_no_time(timeout: float) -> None:
    from workbench.errors import FieldError

    with as_options():
        if not 0 < timeout < float("inf"):
            raise FieldError("timeout", f"{timeout:g} s are no time for a check: {TIMEOUT:g} are")


def _named(package: str, plugin_dirs: list[Path]) -> tuple[str, list[str]]:
    """The name of what is to be checked, and the folders whose files are plugins."""
    from workbench.errors import WorkbenchError
    from workbench.testing.subject import distribution_of

    path = Path(package)
    if path.suffix == ".py":
        if not path.is_file():
            raise WorkbenchError(f"{package}: no such file")
        package, plugin_dirs = path.stem, [*plugin_dirs, path.resolve().parent]
    elif (path / "pyproject.toml").is_file():
        package = distribution_of(path)
    return package, [str(folder.resolve()) for folder in plugin_dirs]


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
    alike: dict[tuple[Any, ...], list[list[Check]]] = {}
    for _, group in groupby(failed, key):
        row = list(group)
        alike.setdefault(_finding(row[0]), []).append(row)
    for found in alike.values():
        _print_failure(*found)
    _print_skipped([check for check in checks if check.outcome == "skipped"])
    if not checks:
        say(f"{subject.name} registers nothing: a hook must call register(name, thing).")
    passed = sum(check.outcome == "passed" for check in checks)
    skipped = len(checks) - passed - len(failed)
    say(
        f"{subject.name}: {count(passed, 'check')} passed, {len(failed)} failed, "
        f"{skipped} skipped in {seconds:.0f} s"
    )


def _print_skipped(skipped: Sequence[Check]) -> None:
    """Things without configs, each with what would mend that; then what was not run, by reason."""
    left: dict[tuple[str, str], list[str]] = {}
    for check in skipped:
        if check.mend:
            say(f"{check.thing} was not checked: {check.message}\n  Mend: {check.mend}\n")
        else:
            left.setdefault((check.thing, check.message), []).append(check.check)
    for (thing, reason), names in left.items():
        say(f"{thing}: {reason} ({_listed(names)})\n")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(name.replace("_", " ") for name in dict.fromkeys(names))


def _outcome(row: Sequence[Check]) -> str:
    failed = sum(check.outcome == "failed" for check in row)
    if failed:
        return f"FAILED {failed} of {len(row)}" if len(row) > 1 else "FAILED"
    return row[0].outcome


def _finding(check: Check) -> tuple[Any, ...]:
    """What is one finding in however many checks."""
    return check.thing, check.message, check.file, check.line, check.mend


def _print_failure(checks: Sequence[Check], *others: Sequence[Check]) -> None:
    """The first failure of a check; its other configs fail alike, and so do the other checks."""
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
    if others:
        say(f"  also in:   {_listed(row[0].check for row in others)}")
    print()
