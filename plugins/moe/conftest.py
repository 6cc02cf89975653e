"""Lets the tests run from a checkout, before the package is installed."""

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def builder_with_moe():
    """Every installed plugin, and those of this folder."""
    from workbench.builder import Builder

    builder = Builder.load([HERE])
    assert not builder.plugins.failures
    return builder
