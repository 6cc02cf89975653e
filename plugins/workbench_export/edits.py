"""Changes a source text where the parser found things, and nowhere else."""

from __future__ import annotations

import ast
import dataclasses


@dataclasses.dataclass(frozen=True)
class _Edit:
    """What lies between two places (line from 0, column in bytes) becomes a text."""

    start: tuple[int, int]
    end: tuple[int, int]
    text: str


class EditedText:
    """A source text and the changes to make in it, all named by nodes of the text as it was."""

    def __init__(self, text: str) -> None:
        # The parser's lines end in \n only (splitlines knows more ends), its columns count bytes.
        self.lines = [line.encode() for line in text.split("\n")]
        self.edits: list[_Edit] = []

    def replace(self, node: ast.expr | ast.stmt, text: str) -> None:
        """Put `text` in the place of a node."""
        last, right = _end(node)
        self.edits.append(_Edit((node.lineno - 1, node.col_offset), (last, right), text))

    def replace_statement(self, node: ast.stmt, statements: list[str]) -> None:
        """Put whole lines, indented alike, in the place of a statement that `stands_alone`."""
        indent = self.lines[node.lineno - 1][: node.col_offset].decode()
        self.replace(node, ("\n" + indent).join(statements))

    def remove_function(self, node: ast.FunctionDef) -> None:
        """Leave out a function and its decorators."""
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        last, right = _end(node)
        self.edits.append(_Edit((first - 1, 0), (last, right), ""))

    def stands_alone(self, node: ast.stmt) -> bool:
        """Whether no other statement shares a line with this one."""
        last, right = _end(node)
        before = self.lines[node.lineno - 1][: node.col_offset]
        after = self.lines[last][right:]
        return not before.strip() and not after.strip().startswith(b";")

    def result(self) -> str:
        """The text with all changes made."""
        lines = list(self.lines)
        for edit in sorted(self.edits, key=lambda edit: edit.start, reverse=True):
            (first, left), (last, right) = edit.start, edit.end
            lines[first : last + 1] = [
                lines[first][:left] + edit.text.encode() + lines[last][right:]
            ]
        return b"\n".join(lines).decode()


def _end(node: ast.expr | ast.stmt) -> tuple[int, int]:
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return node.end_lineno - 1, node.end_col_offset
