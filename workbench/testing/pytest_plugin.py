"""The pytest plugin: fixtures for plugin authors, and readable asserts in the contract suites.

Every pytest run of every project on this machine imports this module, so it imports nothing but
pytest itself; torch comes in with the first test that asks for a fixture.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from workbench.builder import Builder
    from workbench.layout import Layout
    from workbench.records import Study

# Without this a failing contract would print no values: pytest rewrites only test modules.
pytest.register_assert_rewrite(
    "workbench.testing.configs",
    "workbench.testing.data",
    "workbench.testing.exporters",
    "workbench.testing.layers",
    "workbench.testing.metrics",
    "workbench.testing.placements",
    "workbench.testing.presets",
    "workbench.testing.quantizers",
)


def pytest_configure(config: pytest.Config) -> None:
    """Declare the mark of the suites' export round trip: `-m "not slow"` leaves it out."""
    config.addinivalue_line("markers", "slow: longer than a few seconds")


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


@pytest.fixture
def workbench_study(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Study]:
    """A function that runs a real, tiny study over your things and returns its record.

        def test_a_study_searches_it(workbench_study):
            study = workbench_study(layers=[MyLayer, "attention"], trials=2)
            assert study.summary()["outcomes"]["complete"] == 2

    Layers, mlps, quantizers and metrics are lists of names of installed things, or classes;
    placement and data are one each, data also a table such as `{"source": "mqar", …}`. The study
    runs in the test's own process, in seconds: two trials of one or two layers at d_model 32 or
    64, each trained on 1,024 tokens of made-up sentences. More: `objectives` (`["perplexity"]`),
    `d_model` and `num_layers` (a number, or what the space offers), `tokens`, `seq_len`, and the
    tables of a study file, which are added (`space={"layers": {"my-layer": {"width": "search"}}}`).
    """
    from workbench.testing.studies import tiny_study

    def run(**settings: Any) -> Study:
        folder: Path = tmp_path_factory.mktemp("study")
        return tiny_study(folder, **settings)

    return run
