"""What is checked, and what a check found, as plain data that one process can tell another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from workbench.errors import UnknownNameError
from workbench.testing.blame import last_own_line

if TYPE_CHECKING:
    from workbench.builder import Builder

LOADS = "The plugin can be imported, and registers what it offers."


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
    things: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    failures: tuple[Check, ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`, also of what JSON made of it."""
        texts = {name: tuple(data[name]) for name in ("plugins", "things", "files")}
        failures = tuple(Check(**failure) for failure in data["failures"])
        return cls(name=data["name"], failures=failures, **texts)


def find_subject(name: str, builder: Builder) -> Subject:
    """The plugins of a distribution, or the one with that entry point or of that file's stem.

    Raises:
        UnknownNameError: neither a package nor a plugin has that name.
    """
    loaded, failed = builder.plugins.loaded, builder.plugins.failures
    named = {plugin: origin.package for plugin, origin in loaded.items()}
    named |= {plugin: failure.package for plugin, failure in failed.items()}
    wanted = tuple(plugin for plugin, package in named.items() if is_meant(name, plugin, package))
    if not wanted:
        known = {*named, *filter(None, named.values())}
        hint = ""
        if (Path(name) / "pyproject.toml").is_file():
            hint = f"{name} is a folder: install it (pip install -e {name}), then give its name."
        raise UnknownNameError("package or plugin", name, known, hint)
    return Subject(
        name=name,
        plugins=wanted,
        things=tuple(
            f"{kind} {thing}"
            for kind, registry in builder.registries().items()
            for thing in registry
            if registry.provenance(thing).plugin in wanted
        ),
        files=tuple(loaded[plugin].file for plugin in wanted if plugin in loaded),
        failures=tuple(
            _not_loaded(plugin, failed[plugin].reason, failed[plugin].traceback)
            for plugin in wanted
            if plugin in failed
        ),
    )


def is_meant(name: str, plugin: str, package: str | None) -> bool:
    """Whether a name stands for a plugin: it is its own, or that of its distribution."""
    return name == plugin or (package is not None and _normal(package) == _normal(name))


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
        holds=LOADS,
        mend="Correct the line named here; `workbench plugins --traceback` shows the way to it."
        if traceback
        else "Do as the message says.",
    )


def own_tests(files: Sequence[str]) -> list[Path]:
    """Test files beside the plugins' modules or in a folder `tests` there, where they have any."""
    found: list[Path] = []
    for file in map(Path, files):
        inside = (file.parent / "__init__.py").exists()
        folder = file.parent.parent if inside else file.parent
        if folder.name != "site-packages":
            found += [*folder.glob("test_*.py"), *folder.glob("tests/test_*.py")]
    return sorted({path.resolve() for path in found if "Contract" in path.read_text("utf-8")})


def distribution_of(folder: Path) -> str:
    """The name of the project in a folder with a `pyproject.toml`."""
    import tomllib

    with (folder / "pyproject.toml").open("rb") as file:
        return str(tomllib.load(file)["project"]["name"])
