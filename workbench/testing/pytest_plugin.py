"""The pytest plugin: fixtures for plugin authors, and readable asserts in the contract suites.

Every pytest run of every project on this machine imports this module, so it imports nothing but
pytest itself; torch comes in with the first test that asks for a fixture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from workbench.builder import Builder
    from workbench.layout import Layout

# Without this a failing contract would print no values: pytest rewrites only test modules.
pytest.register_assert_rewrite(
    "workbench.testing.configs",
    "workbench.testing.data",
    "workbench.testing.layers",
    "workbench.testing.metrics",
    "workbench.testing.placements",
    "workbench.testing.quantizers",
)


@pytest.fixture(scope="session")
def builder() -> Builder:
    """A builder with every installed plugin, loaded once a session."""
    from workbench.builder import Builder

    return Builder.load()


@pytest.fixture
def small_layout() -> Layout:
    """A hybrid of built-in layers that trains in seconds: d_model 64, bytes, `M-A-`."""
    from workbench.layout import Block, Layout

    names = ("mamba", "swiglu", "attention", "swiglu")
    return Layout(d_model=64, vocab_size=256, blocks=tuple(Block(layer=name) for name in names))
