"""What a contract test says when it fails: what must hold, what to mend, and where to look."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

Test = TypeVar("Test", bound=Callable[..., Any])
MEND = "Mend:"


@dataclasses.dataclass(frozen=True)
class Advice:
    """A contract test's docstring, taken apart.

    Attributes:
        holds: its first line: what must hold.
        mend: its paragraph that begins `Mend:`: what the author must change.
        where: members of the thing under test that are to blame, the likeliest first.
    """

    holds: str
    mend: str
    where: tuple[str, ...]


def concerns(*members: str) -> Callable[[Test], Test]:
    """Mark a contract test with the members of the thing that it judges, the likeliest first."""

    def mark(test: Test) -> Test:
        test.concerns = members  # type: ignore[attr-defined]
        return test

    return mark


def speaks_for(member: str) -> Callable[[Test], Test]:
    """Mark the contract test whose advice is given whenever that member raises, in any check."""

    def mark(test: Test) -> Test:
        test.speaks_for = member  # type: ignore[attr-defined]
        return test

    return mark


def spokesman(suite: type, member: str) -> Advice | None:
    """The advice of the suite's test that speaks for a member; None if there is none."""
    tests = (getattr(suite, name) for name in dir(suite) if name.startswith("test_"))
    speaking = (test for test in tests if getattr(test, "speaks_for", None) == member)
    return next(map(advice_of, speaking), None)


def advice_of(test: Callable[..., Any]) -> Advice:
    """What a contract test tells; empty texts where its docstring does not."""
    holds, _, rest = (inspect.getdoc(test) or "").partition("\n")
    paragraphs = [" ".join(part.split()) for part in rest.split("\n\n")]
    mend = next((part for part in paragraphs if part.startswith(MEND)), "")
    return Advice(
        holds=holds,
        mend=mend.removeprefix(MEND).strip(),
        where=getattr(test, "concerns", ()),
    )
