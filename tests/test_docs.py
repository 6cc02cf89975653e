"""Documents that are made from code are what the code makes now; names in them exist."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from workbench.builder import default_builder
from workbench.study_config import StudyConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_preset_page_is_current():
    path = ROOT / "docs" / "make_presets.py"
    spec = importlib.util.spec_from_file_location("make_presets", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "presets.md").read_text() == module.page(), (
        "run: python docs/make_presets.py"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_in_documents_exist(page):
    commands = {path.stem.replace("_", "-") for path in (ROOT / "workbench" / "cli").glob("*.py")}
    for command in re.findall(r"(?:^|`)workbench ([a-z][a-z-]+)", page.read_text(), re.M):
        assert command in commands


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.toml")), ids=lambda p: p.name)
def test_shipped_studies_are_valid(path):
    from workbench.space import Space
    from workbench.trial import make_metrics, make_training

    config = StudyConfig.read(path)
    builder = default_builder(config.plugin_dirs)
    Space(config.space, builder, 256)
    make_metrics(config, builder)
    make_training(config)


def test_every_builtin_plugin_has_its_entry_point():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = set(data["project"]["entry-points"]["workbench.v1"].values())
    folders = {path.parent.name for path in (ROOT / "plugins").glob("workbench_*/__init__.py")}
    assert declared == folders
