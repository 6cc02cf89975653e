"""What all tests share, those of `tests/` and those beside each package in `plugins/`."""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TypeVar

import pytest

from tests.prepared import Checks, Proofs, Sources
from workbench.executors import process, worker_process
from workbench.testing import watching


@pytest.fixture(scope="module", autouse=True)
def _few_objects_to_look_through() -> None:
    """Leave what modules and tests before this one keep out of later collections of garbage.

    Hundreds of thousands of objects of torch and pytest: 0.2 s a collection, of which each trial
    makes some. Workers do the same once they have imported what they need.
    """
    gc.collect()
    gc.freeze()


Stand = TypeVar("Stand", Proofs, Checks, Sources)


@contextmanager
def _in_place_of(module: ModuleType, name: str, found: Stand) -> Iterator[Stand]:
    """What a module calls by that name; closed afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, found)
        yield found
    found.close()


@pytest.fixture(scope="session", autouse=True)
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proofs]:
    """Where the Hugging Face exporter proves its folders, when it runs in a test's process."""
    from workbench_export import proof

    folder = tmp_path_factory.mktemp("prepared")
    with _in_place_of(proof, "subprocess", Proofs(folder)) as found:
        yield found


@pytest.fixture(scope="session", autouse=True)
def checks() -> Iterator[Checks]:
    """Where plugins are checked, when a test's process asks for that."""
    with _in_place_of(watching, "subprocess", Checks()) as found:
        yield found


@pytest.fixture(scope="session", autouse=True)
def sources() -> Iterator[Sources]:
    """What the workers of studies that run in a test's process are forked from."""
    with _in_place_of(process, "ForkSource", Sources()) as found:
        yield found


@pytest.fixture
def own_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each study has a source of its own, as in reality."""
    monkeypatch.setattr(process, "ForkSource", worker_process.ForkSource)


@pytest.fixture
def own_interpreters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process that checks a plugin begins by itself, as in reality."""
    monkeypatch.setattr(watching, "subprocess", subprocess)
