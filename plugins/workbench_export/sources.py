"""Where Python sources lie and where a name is really defined, read without importing anything."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import sys
import tokenize
from collections.abc import Callable, Iterator
from functools import cached_property
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from workbench.errors import WorkbenchError


@dataclasses.dataclass(frozen=True)
class Source:
    """The text of one module.

    Attributes:
        module: dotted name.
        path: its file.
        text: what the file holds now.
        is_package: it is the `__init__.py` of a package.
    """

    module: str
    path: Path
    text: str
    is_package: bool = False

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, str(self.path))

    def absolute(self, node: ast.ImportFrom) -> str:
        """The module that a `from … import` names, its leading dots worked out."""
        if not node.level:
            return node.module or ""
        package = self.module if self.is_package else self.module.rpartition(".")[0]
        for _ in range(node.level - 1):
            package = package.rpartition(".")[0]
        return f"{package}.{node.module}" if node.module else package


def read_source(module: str) -> Source:
    """The source of an importable module.

    Raises:
        WorkbenchError: it is not there, or no Python file lies behind it.
    """
    spec = _spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise WorkbenchError(
            f"module {module!r} has no Python source file, so it cannot travel with the exported "
            "model: put the code into a .py file of a plugin."
        )
    path = Path(spec.origin)
    try:
        with tokenize.open(path) as file:
            text = file.read()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise WorkbenchError(f"cannot read the source of {module!r}, {path}: {error}") from None
    return Source(module, path, text, spec.submodule_search_locations is not None)


def is_module(name: str) -> bool:
    """Whether a dotted name can be imported as a module."""
    return _spec(name) is not None


def _spec(module: str) -> ModuleSpec | None:
    if module in sys.modules:
        return sys.modules[module].__spec__
    package = module.rpartition(".")[0]
    if not package:
        return importlib.util.find_spec(module)
    # Not `find_spec` of the whole name: that would run the packages around it.
    parent = _spec(package)
    if parent is None or parent.submodule_search_locations is None:
        return None
    return PathFinder.find_spec(module, parent.submodule_search_locations)


def find_definition(
    module: str, name: str, is_ours: Callable[[str], bool]
) -> tuple[str, str | None]:
    """The module that `from module import name` gets its thing from, through re-exports.

    Packages of one's own are seen through, so that importing one name of a package does not carry
    everything that its `__init__.py` imports.

    Returns:
        (module, name there), or (module, None) where the name is a module itself.

    Raises:
        WorkbenchError: nothing there has that name.
    """
    source = read_source(module)
    if not source.is_package:
        return module, name
    bound = _bindings(source).get(name)
    if bound is not None:
        home, attribute = bound
        if home == module or not is_ours(home):
            return module, name
        return (home, None) if attribute is None else find_definition(home, attribute, is_ours)
    if is_module(f"{module}.{name}"):
        return f"{module}.{name}", None
    raise WorkbenchError(
        f"{source.path} defines no {name!r} that can be found by reading it: import it from the "
        "module that defines it."
    )


def _bindings(source: Source) -> dict[str, tuple[str, str | None]]:
    """What a module's top level binds: name → (module, name there), as far as imports say."""
    found: dict[str, tuple[str, str | None]] = {}
    for node in _top_level(source.tree.body):
        if isinstance(node, ast.ImportFrom):
            base = source.absolute(node)
            for alias in node.names:
                target = base, alias.name
                if base == source.module and is_module(f"{base}.{alias.name}"):
                    found[alias.asname or alias.name] = (f"{base}.{alias.name}", None)
                else:
                    found[alias.asname or alias.name] = target
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname:
                    found[alias.asname] = (alias.name, None)
        else:
            for name in _defined(node):
                found[name] = (source.module, name)
    return found


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run on import, those under `if`, `try` and `with` too."""
    for node in body:
        yield node
        for field in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from _top_level(getattr(node, field, []))
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from _top_level(handler.body)


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []
