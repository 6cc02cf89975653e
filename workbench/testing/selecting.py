"""What `check-plugin --only` may say, and what is near to what it says.

The words are pytest's `-k`; it is read here first, because pytest's complaints are about a tree
and a column, and the names of the checks are ours to know.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches

from workbench.errors import FieldError

OPTION = "--only"
JOINING = ("and", "or")
NEAR = 5  # names that are listed
TOKEN = re.compile(r"[()]|[\w:+\-.\[\]\\/]+|\S")
WORD = re.compile(r"[\w:+\-.\[\]\\/]+")
HOW = (
    f"Write parts of names of checks or things, joined by and, or, not: {OPTION} causality, "
    f"{OPTION} 'gradients or costs', {OPTION} 'mamba and not (export or bfloat16)'."
)


def refuse_malformed(only: str) -> None:
    """Refuse what is no expression.

    Raises:
        FieldError: says what is wrong with it, how one is written, and which checks' names
            resemble its words.
    """
    wrong = _fault(TOKEN.findall(only))
    if wrong:
        raise FieldError(OPTION, " ".join([f"{only!r}: {wrong}.", HOW, *_did_you_mean(only)]))


def selects_nothing(only: str) -> FieldError:
    """The error for an expression that no check's name satisfies."""
    text = f"{only!r} selects no check: leave it out to see them all."
    return FieldError(OPTION, " ".join([text, *_did_you_mean(only)]))


def _fault(tokens: list[str]) -> str:
    """What is wrong with an expression; empty if nothing is."""
    before, depth = "", 0
    for token in tokens:
        after_operand = before == ")" or _is_name(before)
        if not (token in "()" or WORD.fullmatch(token)):
            return f"{token!r} is in no name"
        if token in (*JOINING, ")") and not after_operand:
            return f"a name is missing before {token!r}"
        if token not in (*JOINING, ")") and after_operand:
            return f"{token!r} follows {before!r}, with no 'and' or 'or' between them"
        depth += (token == "(") - (token == ")")
        if depth < 0:
            return "a parenthesis is closed that was not opened"
        before = token
    if not tokens:
        return "there is no name in it"
    if not (before == ")" or _is_name(before)):
        return f"a name is missing after {before!r}"
    return "a parenthesis is not closed" if depth else ""


def _is_name(token: str) -> bool:
    return bool(WORD.fullmatch(token)) and token not in (*JOINING, "not")


def _did_you_mean(only: str) -> Iterator[str]:
    near = resembling(only)
    if near:
        yield f"Checks of such names: {', '.join(near)}."


def resembling(only: str) -> list[str]:
    """Names of checks that resemble a word of the expression, or all of its words together.

    Reports print names with spaces, so that words in a row may have been meant as one.
    """
    words = [token for token in TOKEN.findall(only) if _is_name(token)]
    found: dict[str, None] = {}
    for word in dict.fromkeys(["_".join(words), *words]):
        found |= dict.fromkeys(_near(word.lower().removeprefix("test_")))
    return list(found)[:NEAR]


def _near(word: str) -> list[str]:
    names = check_names()
    holding = [name for name in names if word and word in name]
    alike = get_close_matches(word, names, n=NEAR, cutoff=0.7)
    parts = {part for name in names for part in name.split("_")}
    near_parts = get_close_matches(word, sorted(parts), n=2, cutoff=0.75)
    partly = [name for name in names if set(near_parts) & {*name.split("_")}]
    return [*holding, *alike, *partly]


def check_names() -> list[str]:
    """Of all suites, as `check-plugin --json` gives them."""
    from workbench import testing

    suites = (getattr(testing, name) for name in testing.__all__ if name.endswith("Contract"))
    tests = {name for suite in suites for name in dir(suite) if name.startswith("test_")}
    return sorted(name.removeprefix("test_") for name in tests)
