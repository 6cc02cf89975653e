"""What holds for whatever is compiled on a CUDA device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_graph_breaks() -> Iterator[None]:
    """Nothing makes torch.compile leave a graph and begin another one: it does so silently."""
    from torch._dynamo.utils import counters

    counters["graph_break"].clear()
    yield
    assert not counters["graph_break"]
