"""A pytest plugin that tells of each contract test that it begins and how it went."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Generator
from typing import Any

import pytest

from workbench.guard import Guard
from workbench.testing import events
from workbench.testing.advice import advice_of, spokesman
from workbench.testing.blame import member_at, members_of, own_files, place_of

_labels: list[tuple[Any, str]] = []  # what is checked, and how reports call it


@dataclasses.dataclass(frozen=True)
class Identity:
    """A contract test as reports name it, and the members of the thing that it concerns."""

    thing: str
    check: str
    case: str
    concerns: tuple[str, ...]

    def labels(self) -> dict[str, Any]:
        """All but the members."""
        return {"thing": self.thing, "check": self.check, "case": self.case}


def identity_of(item: pytest.Item) -> Identity:
    """Of a test that `pytest_collection_modifyitems` left in the run."""
    thing, test = subject_of(item), _test_of(item)
    return Identity(
        thing=next(label for known, label in _labels if _is_same(known, thing)),
        check=test.removeprefix("test_"),
        case=item.name.removeprefix(test).strip("[]"),
        concerns=advice_of(getattr(item.cls, test)).where,  # type: ignore[attr-defined]
    )


def _test_of(item: pytest.Item) -> str:
    return str(getattr(item, "originalname", item.name))


def subject_of(item: pytest.Item) -> Any:
    """The thing that a contract test is about; None for any other test."""
    suite = getattr(item, "cls", None)
    return getattr(suite, getattr(suite, "under_test", ""), None)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Let `-k` find a thing by the name that it is registered under."""
    label = getattr(getattr(item, "cls", None), "derived", "")
    item.extra_keyword_matches.update(label.split())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """An author's own suite goes before the derived one of the same thing; other tests are not run.

    Only things that are checked count: a test file may hold suites of others, too.
    """
    derived = [item for item in items if hasattr(getattr(item, "cls", None), "derived")]
    _labels[:] = [(subject_of(item), item.cls.derived) for item in derived]  # type: ignore[attr-defined]
    things = [thing for thing, _ in _labels]
    own = [item for item in items if item not in derived and _among(subject_of(item), things)]
    for item in own:
        thing = subject_of(item)
        label = next(label for known, label in _labels if _is_same(known, thing))
        item.extra_keyword_matches.update(label.split())
    covered = [subject_of(item) for item in own]
    kept = [item for item in derived if not _among(subject_of(item), covered)] + own
    dropped = [item for item in items if item not in kept]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def _among(thing: Any, things: list[Any]) -> bool:
    return thing is not None and any(_is_same(thing, other) for other in things)


def _is_same(first: Any, second: Any) -> bool:
    """Whether both are one thing; a plugin file's class is another where its tests import it."""
    if first is second:
        return True
    both = isinstance(first, type) and isinstance(second, type)
    return both and _origin(first) == _origin(second)


def _origin(thing: type) -> tuple[str | None, str]:
    module = sys.modules.get(thing.__module__)
    return getattr(module, "__file__", None), thing.__qualname__


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Tell what begins, and where to look if it never ends."""
    identity, thing = identity_of(item), subject_of(item)
    place = place_of(None, thing, identity.concerns)
    events.tell(
        "started",
        id=item.nodeid,
        **dataclasses.asdict(identity),
        place=place,
        members=sorted(set(members_of(thing).values())),
        own=str(own_files(thing)),
    )
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Put back what a test changed of torch: the check that is there for it reports it, alone."""
    guard = Guard()
    try:
        yield
    finally:
        guard.restore()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tell the outcome of a test: of its call, or of a setup or teardown that did not end well."""
    report = yield
    if report.when == "call" or report.outcome != "passed":
        events.tell("outcome", id=item.nodeid, check=_record(item, call, report))
    return report


def _record(
    item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport
) -> dict[str, Any]:
    record = identity_of(item).labels() | {
        "outcome": report.outcome,
        "seconds": round(report.duration, 3),
    }
    if report.outcome == "passed" or call.excinfo is None:
        return record
    error, thing = call.excinfo.value, subject_of(item)
    suite: type = item.cls  # type: ignore[attr-defined]
    advice = advice_of(getattr(suite, _test_of(item)))
    member = member_at(error, thing)
    if member is not None and member not in advice.where:
        advice = spokesman(suite, member) or advice
    place = place_of(error, thing, advice.where) if report.failed else None
    return record | {
        "message": _message(error),
        "file": place and place[0],
        "line": place and place[1],
        "holds": advice.holds,
        "mend": advice.mend,
    }


def _message(error: BaseException) -> str:
    """What the error says, without pytest's account of the values compared."""
    text = str(error).strip()
    lines = [line for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else ""
    if isinstance(error, AssertionError | pytest.skip.Exception | pytest.fail.Exception):
        return " ".join(lines[:2]) if first.startswith("assert ") else first
    return f"{type(error).__name__}: {first}"
