"""Fixtures of the dashboard's tests: runs folders, and the app as a user opens it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from tests.dashboard.records import write_zoo

ROOT = Path(__file__).parents[2]
PAGES = "workbench/dashboard/views"

Open = Callable[..., AppTest]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty runs folder that the dashboard reads."""
    folder = tmp_path / "runs"
    folder.mkdir()
    monkeypatch.setenv("WORKBENCH_RUNS", str(folder))
    monkeypatch.delenv("WORKBENCH_STUDY", raising=False)
    return folder


@pytest.fixture
def zoo(runs: Path) -> Path:
    """The folder of a study with a trial of every outcome."""
    return write_zoo(runs)


@pytest.fixture
def open_page(monkeypatch: pytest.MonkeyPatch) -> Open:
    """Opens `app.py` at a page with query parameters, and expects no exception."""
    # Streamlit leaves its script as the main module, which later tests' processes would run.
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])

    def open_page(page: str = "studies", **query: str) -> AppTest:
        app = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
        assert not app.exception
        if page != "studies":
            app.switch_page(f"{PAGES}/{page}.py")
        for name, value in query.items():
            app.query_params[name] = value
        app.run()
        assert not app.exception
        return app

    return open_page
