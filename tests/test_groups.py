"""Whether what must run in one process, or one after another, does."""

from __future__ import annotations

import pytest


@pytest.mark.xdist_group("groups")
def test_groups_are_seen(request: pytest.FixtureRequest) -> None:
    """pytest-xdist 3.8 with pytest 9.2 ignores them without a word."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("only where pytest runs with --dist loadgroup")
    assert request.node.nodeid.endswith("@groups")
