"""Finds plugins, says where each came from, and fails loudly on duplicates and misspelled hooks.

A plugin that cannot be used, for whatever reason of its own, is left out and listed with the
reason; what it did to torch or to other plugins meanwhile is undone.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution, entry_points, version
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from workbench import hookspecs, stray_output
from workbench.errors import PluginError, UnknownNameError, WorkbenchError
from workbench.guard import Change, Guard, describe_changes
from workbench.hookspecs import API
from workbench.provenance import SHORT, Provenance, source_digest

__all__ = ["API", "GROUP", "Failure", "Plugins", "Provenance", "discover", "register_all"]

GROUP = f"workbench.v{API}"
GROUPS = re.compile(r"workbench(?:\.v(\d+))?")  # without a number: from before there were any
DISABLE = "WORKBENCH_DISABLE"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """A plugin that cannot be used: where it came from, why, and the whole traceback if any."""

    plugin: str
    module: str
    reason: str
    traceback: str
    package: str | None = None
    version: str | None = None


@dataclasses.dataclass
class Plugins:
    """The outcome of a discovery."""

    manager: pluggy.PluginManager
    loaded: dict[str, Provenance]
    failures: dict[str, Failure]
    disabled: tuple[str, ...]

    @property
    def packages(self) -> set[str]:
        """The top-level packages of the plugins, to be guarded from each other."""
        return {plugin.module.partition(".")[0] for plugin in self.loaded.values()}


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
    _refuse_duplicates([candidate for candidate in candidates if candidate.api == API])
    names = [candidate.name for candidate in candidates]
    for name in disabled:
        if name not in names:
            raise UnknownNameError(f"plugin in {DISABLE}", name, names)
    guard = Guard({candidate.top for candidate in candidates})
    for candidate in candidates:
        if candidate.name in disabled:
            continue
        if candidate.api == API:
            _load(candidate, plugins, guard)
        else:
            _fail(plugins, candidate, _other_api(candidate))
    return plugins


@dataclasses.dataclass(frozen=True)
class _Candidate:
    name: str
    module: str
    package: str | None
    version: str
    file: Path | None = None
    api: int = API
    distribution: Distribution | None = dataclasses.field(default=None, compare=False)

    @property
    def top(self) -> str:
        """Its top-level package."""
        return self.module.partition(".")[0]

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
            sys.modules.pop(self.module, None)
            raise
        return module

    def provenance(self, module: ModuleType) -> Provenance:
        digest = source_digest(module, self.distribution)
        return Provenance(
            plugin=self.name,
            package=self.package,
            version=self.version if self.file is None else f"sha256:{digest[:SHORT]}",
            module=self.module,
            file=str(getattr(module, "__file__", None) or ""),
            sha256=digest,
        )


def _installed() -> list[_Candidate]:
    points = entry_points()
    found = {
        _Candidate(
            name=point.name,
            module=point.value,
            package=_named(point.dist)[0] if point.dist else None,
            version=_named(point.dist)[1] if point.dist else "unknown",
            api=api,
            distribution=point.dist,
        )
        for group in points.groups
        if (api := _api_of(group)) is not None
        for point in points.select(group=group)
    }
    # A package may serve several versions of the workbench, a group each.
    served = {(candidate.package, candidate.name) for candidate in found if candidate.api == API}
    found = {c for c in found if c.api == API or (c.package, c.name) not in served}
    return sorted(found, key=lambda candidate: (candidate.name, candidate.module, candidate.api))


@functools.lru_cache(maxsize=16)  # each look parses the metadata, and a package has many plugins
def _named(distribution: Distribution) -> tuple[str, str]:
    metadata = distribution.metadata
    return metadata["Name"], metadata["Version"]


def _api_of(group: str) -> int | None:
    match = GROUPS.fullmatch(group)
    return int(match[1] or 0) if match else None


def _other_api(candidate: _Candidate) -> str:
    group = f"workbench.v{candidate.api}" if candidate.api else "workbench"
    behind = candidate.api < API
    whose, what = ("plugin", candidate.package) if behind else ("workbench", "lm-workbench")
    return (
        f"{candidate.package} {candidate.version} was made for API {candidate.api} of the "
        f"workbench (its entry point is in the group {group!r}), and lm-workbench "
        f"{version('lm-workbench')} has API {API}: upgrade the {whose}, "
        f"pip install --upgrade {what}"
    )


def _in_folders(plugin_dirs: Iterable[str | Path]) -> list[_Candidate]:
    found = []
    for folder in map(Path, plugin_dirs):
        if not folder.is_dir():
            raise WorkbenchError(f"--plugin-dir {folder}: no such folder")
        for path in sorted(folder.resolve().glob("*.py")):
            if path.name.startswith(("_", "test_")) or path.name == "conftest.py":
                continue
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:SHORT]
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


def _load(candidate: _Candidate, plugins: Plugins, guard: Guard) -> None:
    known = set(sys.modules)
    try:
        with stray_output.apart(f"plugin {candidate.name!r}"):
            module = candidate.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit, too, ends a plugin and nothing else
        guard.restore()
        _fail(plugins, candidate, error)
        return
    if changes := guard.restore():
        _forget(candidate, changes, known)
        _fail(plugins, candidate, describe_changes(changes), _places(changes))
        return
    try:
        plugins.manager.register(module, name=candidate.name)
    except (pluggy.PluginValidationError, ValueError) as error:  # bad hook, or registered twice
        raise PluginError(f"plugin {candidate.name!r} ({_where(candidate)}): {error}") from None
    _refuse_misspelled(plugins.manager, module, candidate)
    _refuse_unmarked(plugins.manager, module, candidate)
    plugins.loaded[candidate.name] = candidate.provenance(module)


def _forget(candidate: _Candidate, changes: list[Change], known: set[str]) -> None:
    """Unload what patched, or a second discovery would find it loaded and harmless."""
    guilty = {name.partition(".")[0] for name in (candidate.module, *(c.module for c in changes))}
    for name in set(sys.modules) - known:
        if name.partition(".")[0] in guilty - {"torch", "workbench"}:
            del sys.modules[name]


def _places(changes: list[Change]) -> str:
    return "\n".join(f"{change.where}: {change.what}" for change in changes if change.where)


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


def _fail(
    plugins: Plugins,
    plugin: _Candidate | Provenance,
    error: BaseException | str,
    places: str = "",
) -> None:
    """Note why a plugin is left out; a text is a reason that needs no traceback."""
    reason, text = str(error), places
    if isinstance(error, BaseException):
        reason = _reason(plugin, error)
        text = "".join(traceback.format_exception(error))
    name = plugin.name if isinstance(plugin, _Candidate) else plugin.plugin
    if earlier := plugins.failures.get(name):  # another of its hooks
        reason, text = f"{earlier.reason}; {reason}", f"{earlier.traceback}\n{text}"
    plugins.failures[name] = Failure(
        plugin=name,
        module=plugin.module,
        reason=reason,
        traceback=text,
        package=plugin.package,
        version=plugin.version,
    )


def _reason(plugin: _Candidate | Provenance, error: BaseException) -> str:
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        missing = error.name.partition(".")[0]
        if missing == plugin.module.partition(".")[0]:
            return f"{reason} (its own module: install {plugin.package or plugin.module} again)"
        if missing not in sys.modules:
            return (
                f"{reason} (it needs the package {missing!r}, which is not installed; "
                f"perhaps: pip install {missing})"
            )
    return reason


def register_all(plugins: Plugins, registries: Mapping[str, Any]) -> None:
    """Fill each registry through the hook `register_…` of its name.

    A plugin whose hook raises, or that patches what others use, joins the failures, and nothing of
    it stays registered. An error of the registry itself (`PluginError`) goes on to the caller.
    """
    guard = Guard(plugins.packages)
    modules = {name: plugins.manager.get_plugin(name) for name in plugins.loaded}
    for name, provenance in list(plugins.loaded.items()):
        others = [module for other, module in modules.items() if other != name]
        for kind, registry in registries.items():
            caller = plugins.manager.subset_hook_caller(f"register_{kind}", others)
            _register(plugins, provenance, caller, registry, guard)
        if changes := guard.restore():
            _fail(plugins, provenance, describe_changes(changes), _places(changes))
        if name in plugins.failures:
            del plugins.loaded[name]
            for registry in registries.values():
                registry.drop(name)


def _register(
    plugins: Plugins, provenance: Provenance, caller: Any, registry: Any, guard: Guard
) -> None:
    try:
        with stray_output.apart(f"plugin {provenance.plugin!r}"):
            caller(register=registry.register_for(provenance))
    except (KeyboardInterrupt, PluginError):
        guard.restore()
        raise
    except BaseException as error:
        _fail(plugins, provenance, error)
