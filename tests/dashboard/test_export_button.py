"""The export button, on a trial that was really trained: what it says happened has happened."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.dashboard.conftest import Open
from tests.workbench.conftest import STUDY, make_config
from workbench.study import run_study

pytestmark = pytest.mark.xdist_group("dashboard-export")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A runs folder with a study of one trial: a tiny Mamba."""
    torch.set_num_threads(1)
    runs = tmp_path_factory.mktemp("trained")
    space = {
        "d_model": 16, "num_layers": 1, "mixers": ["mamba"], "placements": ["alternate"],
        "layers": {"mamba": {"d_state": 8}},
    }  # fmt: skip
    run_study(make_config(STUDY, space=space, **{"budget.trials": 1}), runs)
    return runs


@pytest.fixture
def page(trained, monkeypatch, open_page: Open):
    monkeypatch.setenv("WORKBENCH_RUNS", str(trained))
    return open_page("trial", study="toys", trial="0")


def export_to(page, folder: str):
    page.text_input[0].set_value(folder)
    export = next(button for button in page.button if button.label == "Export and prove")
    return export.click().run(timeout=120)


@pytest.mark.slow
def test_the_button_exports_and_reports(page, tmp_path):
    out = tmp_path / "model"
    app = export_to(page, str(out))
    assert not app.exception
    assert not app.error
    assert str(out) in app.success[0].value
    written = {path.name for path in out.iterdir()}
    assert f"{len(written)} files" in app.success[0].value
    assert {"config.json", "model.safetensors"} <= written
    assert json.loads((out / "workbench.json").read_text())["trial"] == 0


def test_a_folder_that_is_there_is_an_error_and_stays(page, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    app = export_to(page, str(tmp_path))
    assert "is there already" in app.error[0].value
    assert not app.success
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_no_folder_is_an_error(page):
    app = export_to(page, "  ")
    assert "Name a new folder" in app.error[0].value
    assert not app.success


def test_damaged_weights_are_an_error(page, trained, tmp_path):
    weights = trained / "toys" / "trials" / "00000" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    try:
        app = export_to(page, str(tmp_path / "model"))
    finally:
        weights.write_bytes(whole)
    assert app.error
    assert not app.success
    assert not (tmp_path / "model").exists()
