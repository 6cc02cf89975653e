"""What holds for whatever is compiled on a CUDA device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

# What torch's compiler says while it works: of its own doing, and of float32 on such a device.
UNAVOIDABLE = (
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
    "ignore:.class .torch.autograd.function.Function.. should not be:DeprecationWarning",
    "ignore:TensorFloat32 tensor cores:UserWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            for said in UNAVOIDABLE:
                item.add_marker(pytest.mark.filterwarnings(said))


@pytest.fixture(autouse=True)
def _no_graph_breaks() -> Iterator[None]:
    """Nothing makes torch.compile leave a graph and begin another one: it does so silently."""
    from torch._dynamo.utils import counters

    counters["graph_break"].clear()
    yield
    assert not counters["graph_break"]
