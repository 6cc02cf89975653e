"""Finds plugins, says where each came from, and fails loudly on duplicates and misspelled hooks."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from workbench import hookspecs
from workbench.errors import PluginError, UnknownNameError, WorkbenchError

GROUP = "workbench"
DISABLE = "WORKBENCH_DISABLE"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a plugin came from.

    Attributes:
        plugin: its entry point's name, or its file's stem.
        package: distribution, None for a file of a plugin folder.
        version: of the distribution, or `sha256:…` of the file's content.
        module: dotted name.
        file: path of the module.
    """

    plugin: str
    package: str | None
    version: str
    module: str
    file: str

    def to_dict(self) -> dict[str, str | None]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """A plugin that could not be loaded: where it came from, why, and the whole traceback."""

    plugin: str
    module: str
    reason: str
    traceback: str


@dataclasses.dataclass
class Plugins:
    """The outcome of a discovery."""

    manager: pluggy.PluginManager
    loaded: dict[str, Provenance]
    failures: dict[str, Failure]
    disabled: tuple[str, ...]


def discover(plugin_dirs: Iterable[str | Path] = ()) -> Plugins:
    """Load every installed plugin and every `.py` file of the given folders.

    Files whose names begin with `_` or `test_`, and `conftest.py`, are no plugins.

    The environment variable `WORKBENCH_DISABLE` holds names to leave out, separated by commas.

    Raises:
        PluginError: two plugins with one name, or a hook that does not exist.
        UnknownNameError: a name in `WORKBENCH_DISABLE` that no plugin has.
        WorkbenchError: a plugin folder that is not there.
    """
    manager = pluggy.PluginManager("workbench")
    manager.add_hookspecs(hookspecs)
    disabled = tuple(filter(None, (n.strip() for n in os.environ.get(DISABLE, "").split(","))))
    plugins = Plugins(manager, {}, {}, disabled)
    candidates = [*_installed(), *_in_folders(plugin_dirs)]
    _refuse_duplicates(candidates)
    names = [candidate.name for candidate in candidates]
    for name in disabled:
        if name not in names:
            raise UnknownNameError(f"plugin in {DISABLE}", name, names)
    for candidate in candidates:
        if candidate.name not in disabled:
            _load(candidate, plugins)
    return plugins


@dataclasses.dataclass(frozen=True)
class _Candidate:
    name: str
    module: str
    package: str | None
    version: str
    file: Path | None = None

    def load(self) -> ModuleType:
        if self.file is None:
            return importlib.import_module(self.module)
        spec = importlib.util.spec_from_file_location(self.module, self.file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[self.module] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[self.module]
            raise
        return module


def _installed() -> list[_Candidate]:
    found = {
        _Candidate(
            name=point.name,
            module=point.value,
            package=point.dist.name if point.dist else None,
            version=point.dist.version if point.dist else "unknown",
        )
        for point in entry_points(group=GROUP)
    }
    return sorted(found, key=lambda candidate: (candidate.name, candidate.module))


def _in_folders(plugin_dirs: Iterable[str | Path]) -> list[_Candidate]:
    found = []
    for folder in map(Path, plugin_dirs):
        if not folder.is_dir():
            raise WorkbenchError(f"--plugin-dir {folder}: no such folder")
        for path in sorted(folder.resolve().glob("*.py")):
            if path.name.startswith(("_", "test_")) or path.name == "conftest.py":
                continue
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
            module = f"workbench_plugin_{path.stem}"
            found.append(_Candidate(path.stem, module, None, f"sha256:{digest}", path))
    return found


def _refuse_duplicates(candidates: list[_Candidate]) -> None:
    seen: dict[str, _Candidate] = {}
    for candidate in candidates:
        other = seen.setdefault(candidate.name, candidate)
        if other is not candidate:
            raise PluginError(
                f"two plugins are called {candidate.name!r}: {_where(other)} and "
                f"{_where(candidate)}. Uninstall or rename one of them."
            )


def _where(candidate: _Candidate) -> str:
    if candidate.file is not None:
        return str(candidate.file)
    return f"{candidate.module} ({candidate.package} {candidate.version})"


def _load(candidate: _Candidate, plugins: Plugins) -> None:
    try:
        module = candidate.load()
    except (Exception, SystemExit) as error:
        _fail(plugins, candidate.name, candidate.module, error)
        return
    try:
        plugins.manager.register(module, name=candidate.name)
    except (pluggy.PluginValidationError, ValueError) as error:  # bad hook, or registered twice
        raise PluginError(f"plugin {candidate.name!r} ({_where(candidate)}): {error}") from None
    _refuse_misspelled(plugins.manager, module, candidate)
    _refuse_unmarked(plugins.manager, module, candidate)
    plugins.loaded[candidate.name] = Provenance(
        plugin=candidate.name,
        package=candidate.package,
        version=candidate.version,
        module=candidate.module,
        file=str(getattr(module, "__file__", None) or ""),
    )


def _refuse_misspelled(
    manager: pluggy.PluginManager, module: ModuleType, candidate: _Candidate
) -> None:
    for caller in manager.get_hookcallers(module) or []:
        if not caller.has_spec():
            known = [name for name in vars(hookspecs) if name.startswith("register_")]
            error = UnknownNameError("hook", caller.name, known)
            raise PluginError(
                f"plugin {candidate.name!r} ({_where(candidate)}): {error} "
                f"{DISABLE}={candidate.name} leaves the plugin out."
            )


def _refuse_unmarked(
    manager: pluggy.PluginManager, module: ModuleType, candidate: _Candidate
) -> None:
    for name in vars(hookspecs):
        function = vars(module).get(name) if name.startswith("register_") else None
        if callable(function) and manager.parse_hookimpl_opts(module, name) is None:
            raise PluginError(
                f"plugin {candidate.name!r} ({_where(candidate)}): {name} would never be called: "
                "mark it with @workbench.hookimpl."
            )


def _fail(plugins: Plugins, name: str, module: str, error: BaseException) -> None:
    reason = f"{type(error).__name__}: {error}"
    text = "".join(traceback.format_exception(error))
    if earlier := plugins.failures.get(name):  # another of its hooks
        reason, text = f"{earlier.reason}; {reason}", f"{earlier.traceback}\n{text}"
    plugins.failures[name] = Failure(plugin=name, module=module, reason=reason, traceback=text)


def run_hooks(plugins: Plugins, hook: str, register_for: Any) -> None:
    """Call one hook of every loaded plugin, each with `register_for(provenance)`.

    A plugin whose hook raises joins the failures; an error of the registry itself (`PluginError`)
    goes on to the caller.
    """
    everyone = {name: plugins.manager.get_plugin(name) for name in plugins.loaded}
    for name, provenance in list(plugins.loaded.items()):
        others = [plugin for other, plugin in everyone.items() if other != name]
        caller = plugins.manager.subset_hook_caller(hook, others)
        try:
            caller(register=register_for(provenance))
        except PluginError:
            raise
        except (Exception, SystemExit) as error:
            _fail(plugins, name, provenance.module, error)
