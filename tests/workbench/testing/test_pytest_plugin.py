"""The pytest plugin costs other projects nothing, and gives plugin authors what they need."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from workbench.builder import Builder
from workbench.layout import Layout

COLLECT = """
import sys, pytest
code = pytest.main(["-q", "-p", "no:cacheprovider", "test_nothing.py"])
assert code == 0, code
assert "workbench.testing.pytest_plugin" in sys.modules
heavy = {"torch", "pandas", "optuna", "streamlit", "transformers", "safetensors"}
assert not heavy & set(sys.modules), sorted(heavy & set(sys.modules))
core = {name for name in sys.modules if name.startswith("workbench")}
print(sorted(core))
assert core <= {"workbench", "workbench.hookspecs", "workbench.testing",
                "workbench.testing.pytest_plugin"}
"""

FAILING = """
from workbench.layer import Layer
from workbench.testing import LayerContract

class Mine(Layer):
    reference = "a test"

class TestMine(LayerContract):
    layer = Mine
    configs = [Mine.Config()]
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def test_it_is_found_by_its_entry_point() -> None:
    (point,) = entry_points(group="pytest11", name="workbench")
    assert point.value == "workbench.testing.pytest_plugin"


def test_another_projects_tests_load_nothing_heavy(tmp_path: Path) -> None:
    """Nor any module of ours but the plugin and the packages around it."""
    (tmp_path / "test_nothing.py").write_text("def test_nothing(): pass\n")
    result = run(tmp_path, "-c", COLLECT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_failing_suites_show_values(tmp_path: Path) -> None:
    """Asserts of the suites are rewritten as those of test modules are."""
    (tmp_path / "test_mine.py").write_text(FAILING)
    result = run(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "attributes")
    assert result.returncode == 1
    assert "'?' stands for a layer without a glyph" in result.stdout
    assert "assert '?' != '?'" in result.stdout


def test_builder_fixture(builder: Builder) -> None:
    assert isinstance(builder, Builder)
    assert "mlp" in builder.plugins.loaded


def test_small_layout_fixture(builder: Builder, small_layout: Layout) -> None:
    assert builder.pattern(small_layout) == "M-A-"
    assert builder.costs(small_layout, length=1).total.parameters < 200_000


def test_the_fixtures_are_listed_with_their_docstrings(tmp_path: Path) -> None:
    result = run(tmp_path, "-m", "pytest", "--fixtures", "-q", "-p", "no:cacheprovider")
    assert "A builder with every installed plugin" in result.stdout
    assert "A hybrid of built-in layers" in result.stdout
    assert "A function that runs a real, tiny study" in result.stdout


def test_the_mark_of_the_slow_round_trip_is_declared(tmp_path: Path) -> None:
    """A project with strict markers may leave it out."""
    result = run(tmp_path, "-m", "pytest", "--markers", "-p", "no:cacheprovider")
    assert "@pytest.mark.slow: " in result.stdout


def test_public_names_load_on_first_use() -> None:
    from workbench import testing

    assert set(testing.__all__) <= set(dir(testing))
    for name in testing.__all__:
        assert getattr(testing, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'LayerContrct'"):
        testing.LayerContrct  # noqa: B018
