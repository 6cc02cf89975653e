"""Copies the sources behind a model into flat files that import only one another.

Hugging Face loads custom code from one folder of files, which it finds by following statements of
the form `from .file import name`; it refuses to load while any package is missing that an import
outside a `try` names, even where no call reaches that import. So every import of ours becomes
such a statement, every other one that is not Python's or torch's goes into a `try`, and what only
the workbench needs (plugin hooks, imports for type checkers) is left out. Statements are replaced
where the parser found them; everything else stays as its author wrote it.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import NoReturn

from workbench.errors import WorkbenchError
from workbench_export.attributes import (
    attribute_chain,
    is_type_checking,
    module_uses,
    runtime_nodes,
)
from workbench_export.edits import EditedText
from workbench_export.sources import Source, find_definition, read_source

HOOKS = "workbench.hookspecs"
# Always there where the exported model is loaded.
GIVEN = {"torch", "transformers", "huggingface_hub", "safetensors"}


@dataclasses.dataclass(frozen=True)
class Vendored:
    """Flat files and what they ask for.

    Attributes:
        files: file name → text.
        stems: module → file name without `.py`.
        foreign: other packages that are imported unconditionally.
    """

    files: dict[str, str]
    stems: dict[str, str]
    foreign: frozenset[str]


def vendor(
    modules: Iterable[str],
    packages: Collection[str],
    *,
    stems: Mapping[str, str] | None = None,
    without: Collection[str] = (),
) -> Vendored:
    """These modules and all that they import from `packages`, directly or not.

    Args:
        packages: names of the top-level packages and modules to copy from.
        stems: file names for some modules; the others are called by their dotted names.
        without: modules that get a name and no file: the caller writes it.

    Raises:
        WorkbenchError: an import that cannot be rewritten; says where and what to write instead.
    """
    folder = _Folder(frozenset(packages), dict(stems or {}))
    for module in modules:
        folder.stem(module)
    while folder.waiting:
        module = folder.waiting.pop(0)
        if module not in without:
            text = _Rewriter(read_source(module), folder).rewritten()
            folder.files[f"{folder.stems[module]}.py"] = text
    return Vendored(folder.files, folder.stems, frozenset(folder.foreign))


class _Folder:
    """What is copied so far and what waits for it."""

    def __init__(self, packages: frozenset[str], wanted: dict[str, str]) -> None:
        self.packages = packages
        self.wanted = wanted
        self.stems: dict[str, str] = {}
        self.files: dict[str, str] = {}
        self.foreign: set[str] = set()
        self.waiting: list[str] = []

    def is_ours(self, module: str) -> bool:
        return module.partition(".")[0] in self.packages

    def stem(self, module: str) -> str:
        """The file name (without `.py`) of a module, which is copied from now on."""
        if module not in self.stems:
            # A file of a plugin folder may be called anything.
            stem = self.wanted.get(module, re.sub(r"\W", "_", module))
            while stem in self.stems.values():  # a.b_c and a_b.c
                stem += "_"
            self.stems[module] = stem
            self.waiting.append(module)
        return self.stems[module]


class _Rewriter(ast.NodeVisitor):
    """Makes one module part of the flat folder."""

    def __init__(self, source: Source, folder: _Folder) -> None:
        self.source = source
        self.folder = folder
        self.text = EditedText(source.text)
        self.type_checking = False
        self.in_try = False
        self.depth = 0

    def rewritten(self) -> str:
        """The module's new text."""
        self._find_hook_names()
        hooks = [node for node in self.source.tree.body if self._is_hook(node)]
        kept = [node for node in self.source.tree.body if node not in hooks]
        self.uses, replaced = module_uses(self.source, kept, self.folder.is_ours, self._refuse)
        for expression, alias in replaced:
            self.text.replace(expression, alias)
        for node in hooks:
            assert isinstance(node, ast.FunctionDef)
            self.text.remove_function(node)
        for node in kept:
            self.visit(node)
        # Two lines: an encoding declared in the first two of the source no longer counts.
        return (
            f"# Copied from {self.source.module} when this model was exported;\n"
            f"# imports rewritten.\n{self.text.result()}"
        )

    # Plugin hooks speak to the workbench only

    def _find_hook_names(self) -> None:
        self.hook_names: set[str] = set()
        self.packages: set[str] = set()
        for node in runtime_nodes(self.source.tree):
            if isinstance(node, ast.Import):
                self.packages |= {
                    alias.asname or alias.name.partition(".")[0]
                    for alias in node.names
                    if self.folder.is_ours(alias.name)
                }
            elif isinstance(node, ast.ImportFrom) and self._is_ours(node):
                for alias in node.names:
                    if alias.name != "*" and self._definition(node, alias.name)[0] == HOOKS:
                        self.hook_names.add(alias.asname or alias.name)

    def _is_hook(self, node: ast.stmt) -> bool:
        return isinstance(node, ast.FunctionDef) and any(
            self._is_hookimpl(decorator) for decorator in node.decorator_list
        )

    def _is_hookimpl(self, decorator: ast.expr) -> bool:
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        if isinstance(called, ast.Name):
            return called.id in self.hook_names
        chain = attribute_chain(called)
        return chain is not None and chain[0] in self.packages and chain[-1] == "hookimpl"

    # Imports

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module == "__future__":
            return
        if self.type_checking:
            self._replace(node, [])
        elif self._is_ours(node):
            self._replace(node, self._from_lines(node))
        else:
            self._foreign(node, [node.module or ""])

    def visit_Import(self, node: ast.Import) -> None:
        ours = [alias for alias in node.names if self.folder.is_ours(alias.name)]
        if self.type_checking:
            self._replace(node, [])
        elif not ours:
            self._foreign(node, [alias.name for alias in node.names])
        else:
            others = [alias for alias in node.names if alias not in ours]
            lines = [ast.unparse(ast.Import([alias])) for alias in others]
            for alias in ours:
                lines += self._use_lines(alias.asname or alias.name.partition(".")[0])
            self._replace(node, lines)

    def _from_lines(self, node: ast.ImportFrom) -> list[str]:
        items: dict[str, list[str]] = {}
        lines = []
        for alias in node.names:
            if alias.name == "*":
                self._refuse(node, "imports everything: name what it needs")
            local = alias.asname or alias.name
            home, name = self._definition(node, alias.name)
            if name is None:
                lines += self._use_lines(local)
            elif home != HOOKS:
                item = name if name == local else f"{name} as {local}"
                items.setdefault(self.folder.stem(home), []).append(item)
        return [f"from .{stem} import {', '.join(names)}" for stem, names in items.items()] + lines

    def _use_lines(self, local: str) -> list[str]:
        """Imports of what is used through a module that `local` is bound to."""
        return [
            f"from .{self.folder.stem(home)} import {name} as {alias}"
            for alias, (home, name) in sorted(self.uses.get(local, {}).items())
        ]

    def _foreign(self, node: ast.Import | ast.ImportFrom, modules: list[str]) -> None:
        others = {module.partition(".")[0] for module in modules}
        others -= GIVEN | sys.stdlib_module_names
        if self.in_try or not others:
            return
        if not self.depth:
            self.folder.foreign |= others
        # Raised again as it is: the `try` only keeps Hugging Face from asking for it beforehand.
        lines = ["try:", f"    {ast.unparse(node)}", "except ImportError:", "    raise"]
        self._replace(node, lines)

    # Where an import stands

    def visit_If(self, node: ast.If) -> None:
        before = self.type_checking
        self.depth += 1
        self.visit(node.test)
        self.type_checking = before or is_type_checking(node)
        for child in node.body:
            self.visit(child)
        self.type_checking = before
        for child in node.orelse:
            self.visit(child)
        self.depth -= 1

    def visit_Try(self, node: ast.Try) -> None:
        before, self.in_try = self.in_try, True
        self.generic_visit(node)
        self.in_try = before

    def generic_visit(self, node: ast.AST) -> None:
        self.depth += isinstance(node, ast.stmt)
        super().generic_visit(node)
        self.depth -= isinstance(node, ast.stmt)

    # What cannot be carried

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in self.hook_names:
            self._refuse(node, f"uses {node.id!r} outside the hooks at its top level")

    def visit_Call(self, node: ast.Call) -> None:
        chain = attribute_chain(node.func)
        argument = node.args[0] if node.args else None
        if (
            chain is not None
            and chain[-1] in ("import_module", "__import__")
            and isinstance(argument, ast.Constant)
            and self.folder.is_ours(str(argument.value))
        ):
            self._refuse(node, f"imports {argument.value!r} by a call: use an import statement")
        self.generic_visit(node)

    def _refuse(self, node: ast.AST, why: str) -> NoReturn:
        line = getattr(node, "lineno", 0)
        raise WorkbenchError(
            f"{self.source.path}, line {line} cannot travel with the exported model: it {why}."
        )

    def _is_ours(self, node: ast.ImportFrom) -> bool:
        return self.folder.is_ours(self.source.absolute(node))

    def _definition(self, node: ast.ImportFrom, name: str) -> tuple[str, str | None]:
        return find_definition(self.source.absolute(node), name, self.folder.is_ours)

    def _replace(self, node: ast.stmt, lines: list[str]) -> None:
        if not self.text.stands_alone(node):
            self._refuse(node, "shares a line with another statement: give it a line of its own")
        if not lines and self.depth:
            lines = ["pass"]  # it may be all that its block holds
        self.text.replace_statement(node, lines)
