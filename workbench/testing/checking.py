"""Runs the contract suites on a plugin in a process of their own, and reads what they found."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import UnknownNameError, WorkbenchError
from workbench.testing.blame import last_own_line

if TYPE_CHECKING:
    from workbench.builder import Builder

MODULE = """from workbench.testing.derived_suites import suites

globals().update(suites({plugins!r}, {plugin_dirs!r}))
"""
OUT = "WORKBENCH_CHECK_RESULTS"  # names the file that the process in between writes
NOTHING_COLLECTED = 5  # exit statuses of pytest
TESTS_FAILED = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One check of one thing with one config.

    Attributes:
        thing: kind and name (`layer mamba`), or `plugin NAME` for its loading.
        check: the contract test's name without `test_`.
        case: the config, or another parameter of the test; empty if there is none.
        outcome: `passed`, `failed` or `skipped`.
        seconds: how long it took.
        message: what was found, unless it passed.
        file, line: where to look, if that is known.
        holds: what must hold.
        mend: what the author must change.
    """

    thing: str
    check: str
    case: str
    outcome: str
    seconds: float
    message: str = ""
    file: str | None = None
    line: int | None = None
    holds: str = ""
    mend: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What is checked: plugins by name, what they register, and those that did not load."""

    name: str
    plugins: tuple[str, ...]
    things: tuple[str, ...]
    files: tuple[Path, ...]
    plugin_dirs: tuple[str, ...]
    failures: tuple[Check, ...]


def find_subject(name: str, builder: Builder, plugin_dirs: Sequence[str]) -> Subject:
    """The plugins of a distribution, or the one with that entry point or of that file's stem.

    Raises:
        UnknownNameError: neither a package nor a plugin has that name.
    """
    loaded, failed = builder.plugins.loaded, builder.plugins.failures
    named = {plugin: origin.package for plugin, origin in loaded.items()}
    named |= {plugin: failure.package for plugin, failure in failed.items()}
    wanted = tuple(
        plugin
        for plugin, package in named.items()
        if name == plugin or (package and _normal(package) == _normal(name))
    )
    if not wanted:
        known = {*named, *filter(None, named.values())}
        raise UnknownNameError("package or plugin", name, known)
    return Subject(
        name=name,
        plugins=wanted,
        things=tuple(
            f"{kind} {thing}"
            for kind, registry in builder.registries().items()
            for thing in registry
            if registry.provenance(thing).plugin in wanted
        ),
        files=tuple(Path(loaded[plugin].file) for plugin in wanted if plugin in loaded),
        plugin_dirs=tuple(plugin_dirs),
        failures=tuple(
            _not_loaded(plugin, failed[plugin].reason, failed[plugin].traceback)
            for plugin in wanted
            if plugin in failed
        ),
    )


def _normal(package: str) -> str:
    return package.lower().replace("_", "-").replace(".", "-")


def _not_loaded(plugin: str, reason: str, traceback: str) -> Check:
    file, line = last_own_line(traceback) or (None, None)
    return Check(
        thing=f"plugin {plugin}",
        check="loads",
        case="",
        outcome="failed",
        seconds=0.0,
        message=reason,
        file=file,
        line=line,
        holds="The plugin can be imported, and registers what it offers.",
        mend="Correct the line named here; `workbench plugins --traceback` shows the way to it."
        if traceback
        else "Do as the message says.",
    )


def own_tests(subject: Subject) -> list[Path]:
    """Test files beside the plugin's module or in a folder `tests` there, where it has any."""
    found: list[Path] = []
    for file in subject.files:
        inside = (file.parent / "__init__.py").exists()
        folder = file.parent.parent if inside else file.parent
        if folder.name != "site-packages":
            found += [*folder.glob("test_*.py"), *folder.glob("tests/test_*.py")]
    return sorted({path.resolve() for path in found if "Contract" in path.read_text("utf-8")})


def run_checks(
    subject: Subject, tests: Sequence[Path] = (), only: str | None = None
) -> list[Check]:
    """Every check of every thing; those that failed to load come first.

    Args:
        tests: files whose contract suites go before the derived ones.
        only: pytest's `-k`: part of a name of a check or a thing, with `and`, `or`, `not`.

    Raises:
        WorkbenchError: pytest is not installed, `only` selects nothing, or pytest ended badly.
    """
    if importlib.util.find_spec("pytest") is None:
        raise WorkbenchError(
            "check-plugin needs pytest, which is not installed: pip install 'lm-workbench[testing]'"
        )
    if not subject.things:
        return list(subject.failures)
    with tempfile.TemporaryDirectory(prefix="workbench-check-") as name:
        folder = Path(name)
        module, results = folder / "test_check.py", folder / "results.jsonl"
        module.write_text(
            MODULE.format(plugins=subject.plugins, plugin_dirs=subject.plugin_dirs), "utf-8"
        )
        (folder / "pytest.ini").write_text("[pytest]\n", "utf-8")
        command = [
            *(sys.executable, "-m", "pytest", str(module), *map(str, tests)),
            *("-c", str(folder / "pytest.ini"), "--rootdir", str(folder)),
            *("-p", "workbench.testing.results", "-p", "no:cacheprovider"),
            *("--import-mode=importlib", "-q", "--no-header", "--tb=short"),
            *(("-k", only) if only else ()),
        ]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, OUT: str(results)}
        # Where the tests of a plugin file find it, as they do when pytest is run beside them.
        paths = [*subject.plugin_dirs, os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        _refuse_bad_end(done, only)
        lines = results.read_text("utf-8").splitlines() if results.exists() else []
    return [*subject.failures, *(_check(json.loads(line)) for line in lines)]


def _check(record: dict[str, Any]) -> Check:
    return Check(**record)


def _refuse_bad_end(done: subprocess.CompletedProcess[str], only: str | None) -> None:
    if done.returncode == NOTHING_COLLECTED and only:
        raise WorkbenchError(f"--only {only!r} selects no check: leave it out to see them all")
    if done.returncode not in (0, TESTS_FAILED):
        words = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise WorkbenchError(f"pytest could not run the suites. Its last words:\n{words}")


def distribution_of(folder: Path) -> str:
    """The name of the project in a folder with a `pyproject.toml`."""
    import tomllib

    with (folder / "pyproject.toml").open("rb") as file:
        return str(tomllib.load(file)["project"]["name"])
