"""What a module uses of other modules through dots: `import pkg.layers` … `pkg.layers.Layer`.

A flat folder has no packages, so each such use becomes a name imported on its own.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn

from workbench_export.sources import Source, find_definition, is_module

Uses = dict[str, dict[str, tuple[str, str]]]
Refuse = Callable[[ast.AST, str], NoReturn]


def attribute_chain(node: ast.AST) -> list[str] | None:
    """`["a", "b", "c"]` of the expression `a.b.c`; None for any other."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return [node.id, *names] if isinstance(node, ast.Name) else None


def module_uses(
    source: Source, body: Iterable[ast.stmt], is_ours: Callable[[str], bool], refuse: Refuse
) -> tuple[Uses, list[tuple[ast.expr, str]]]:
    """Uses of our modules through names bound to them.

    Args:
        body: the statements of `source` to look at.
        refuse: called with a node and what is wrong with it; must raise.

    Returns:
        local name → alias → (module, name there), and each expression with the alias to put in
        its place.
    """
    finder = _Finder(source, is_ours, refuse)
    nodes = list(body)
    for node in nodes:
        finder.bind(node)
    if finder.modules:
        for node in nodes:
            finder.visit(node)
    return finder.uses, finder.replaced


class _Finder(ast.NodeVisitor):
    def __init__(self, source: Source, is_ours: Callable[[str], bool], refuse: Refuse) -> None:
        self.source = source
        self.is_ours = is_ours
        self.refuse = refuse
        self.modules: dict[str, str] = {}
        self.uses: Uses = {}
        self.replaced: list[tuple[ast.expr, str]] = []

    def bind(self, statement: ast.stmt) -> None:
        """Note the names that imports in `statement` bind to modules of ours."""
        for node in runtime_nodes(statement):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if self.is_ours(alias.name):
                        top = alias.name.partition(".")[0]
                        self.modules[alias.asname or top] = alias.name if alias.asname else top
            elif isinstance(node, ast.ImportFrom) and self.is_ours(self.source.absolute(node)):
                for alias in node.names:
                    if alias.name != "*":
                        self._bind_from(node, alias)

    def _bind_from(self, node: ast.ImportFrom, alias: ast.alias) -> None:
        home, name = find_definition(self.source.absolute(node), alias.name, self.is_ours)
        if name is None:
            self.modules[alias.asname or alias.name] = home

    def visit_If(self, node: ast.If) -> None:
        for child in _runtime_children(node):
            self.visit(child)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        chain = attribute_chain(node)
        if chain is None or chain[0] not in self.modules:
            self.generic_visit(node)
            return
        module, count = self.modules[chain[0]], 1
        while count < len(chain) and is_module(f"{module}.{chain[count]}"):
            module, count = f"{module}.{chain[count]}", count + 1
        if count == len(chain):
            self.refuse(node, f"uses the module {module} as a value: import the names it needs")
        used: ast.expr = node
        for _ in range(len(chain) - 1 - count):
            assert isinstance(used, ast.Attribute)
            used = used.value
        assert isinstance(used, ast.Attribute)
        if not isinstance(used.ctx, ast.Load):
            self.refuse(node, f"assigns to a name of the module {module}")
        home, name = find_definition(module, chain[count], self.is_ours)
        if name is None:
            self.refuse(node, f"uses the module {home} as a value: import the names it needs")
        alias = f"{home.replace('.', '_')}_{name}"
        self.uses.setdefault(chain[0], {})[alias] = (home, name)
        self.replaced.append((used, alias))

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in self.modules:
            self.refuse(node, f"uses the module {node.id!r} as a value: import the names it needs")

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        # Python 3.11 does not know where in the file the parts of an f-string stand.
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and part.id in self.modules:
                self.refuse(node, f"uses the module {part.id!r} in an f-string: give it a name")

    def visit_arg(self, node: ast.arg) -> None:
        if node.arg in self.modules:
            self.refuse(node, f"calls an argument {node.arg!r} like a module: rename one")
        self.generic_visit(node)


def is_type_checking(node: ast.If) -> bool:
    """Whether only a type checker sees the body of this statement."""
    chain = attribute_chain(node.test)
    return chain is not None and chain[-1] == "TYPE_CHECKING"


def _runtime_children(node: ast.AST) -> Iterable[ast.AST]:
    if isinstance(node, ast.If) and is_type_checking(node):
        return node.orelse
    return ast.iter_child_nodes(node)


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all below it, without what only a type checker sees."""
    yield node
    for child in _runtime_children(node):
        yield from runtime_nodes(child)
