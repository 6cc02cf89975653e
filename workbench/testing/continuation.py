"""A pytest plugin that goes on where a process ended: what is left to run, and in which order."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pytest

from workbench.testing import events
from workbench.testing.results import Identity, identity_of


class Continuation:
    """Leaves out what has an outcome, and what would only end the process once more.

    Args:
        done: ids of tests that have an outcome.
        ends: the tests that ended a process: their identity, and the members that they were in.
        exhausted: things whose checks did so for so long that no more that concern these members
            are run.
    """

    def __init__(
        self, done: Collection[str], ends: Sequence[dict[str, Any]], exhausted: Collection[str]
    ) -> None:
        self.done = frozenset(done)
        self.ends = ends
        self.exhausted = exhausted

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Drop, put off and tell; after `-k` has chosen."""
        events.tell("collected", ids=[item.nodeid for item in items])
        run, dropped = [], []
        for item in items:
            identity = identity_of(item)
            reason = self._reason(identity)
            if item.nodeid in self.done or reason:
                dropped.append(item)
            else:
                is_slow = item.get_closest_marker("slow") is not None
                run.append(((is_slow, self._risk(identity)), item))
            if item.nodeid not in self.done and reason:
                skipped = {"outcome": "skipped", "seconds": 0.0, "message": reason}
                events.tell("outcome", id=item.nodeid, check=identity.labels() | skipped)
        if dropped:
            config.hook.pytest_deselected(items=dropped)
        items[:] = [item for _, item in sorted(run, key=lambda pair: pair[0])]

    def _of(self, thing: str) -> list[dict[str, Any]]:
        return [end for end in self.ends if end["thing"] == thing]

    def _reason(self, identity: Identity) -> str:
        """Why a test is not run; empty if it is."""
        ends = self._of(identity.thing)
        if any(end["check"] == identity.check for end in ends):
            return "not run: another config of the check ended the process or hung"
        if identity.thing in self.exhausted and self._risk(identity):
            return f"not run: checks like it ended the process or hung ({len(ends)} so far)"
        return ""

    def _risk(self, identity: Identity) -> int:
        """How much it has in common with the checks that ended a process."""
        concerned = set(identity.concerns)
        return sum(len(concerned & set(end["concerns"])) for end in self._of(identity.thing))
