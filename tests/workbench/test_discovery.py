"""Plugins are found, named with where they came from, and refused loudly where they clash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest

from tests.workbench.plugin_files import (
    builder_of,
    only_these,
    write_layer_plugin,
    write_plugin,
)
from workbench.builder import Builder
from workbench.discovery import GROUP, discover
from workbench.errors import PluginError, UnknownNameError, WorkbenchError


@pytest.fixture(autouse=True)
def no_installed_plugins() -> Iterator[None]:
    with only_these():
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "plugins"


def installed(name: str, module: str) -> EntryPoint:
    return EntryPoint(name=name, value=module, group=GROUP)


def test_a_file_says_where_it_came_from(folder: Path) -> None:
    path = write_layer_plugin(folder, "mine", "idle")
    provenance = discover([folder]).loaded["mine"]
    assert provenance.file == str(path)
    assert provenance.package is None
    assert provenance.version == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    assert provenance.module == "workbench_plugin_mine"


def test_built_in_plugins_come_as_a_strangers_would() -> None:
    points = [point for point in entry_points(group=GROUP) if point.name == "mlp"]
    with only_these(*points):
        provenance = discover().loaded["mlp"]
    assert provenance.package == "lm-workbench"
    assert provenance.module == "workbench_mlp"
    assert provenance.file.endswith("workbench_mlp/__init__.py")


def test_files_that_are_no_plugins_are_left_alone(folder: Path) -> None:
    write_layer_plugin(folder, "mine", "idle")
    for name in ("test_mine", "_helpers", "__init__", "conftest"):
        (folder / f"{name}.py").write_text("raise RuntimeError('not a plugin')\n")
    (folder / "notes.txt").write_text("not Python")
    plugins = discover([folder])
    assert list(plugins.loaded) == ["mine"]
    assert plugins.failures == {}


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match="nowhere: no such folder"):
        discover([tmp_path / "nowhere"])


def test_two_plugins_of_one_name_are_both_named(tmp_path: Path) -> None:
    first = write_layer_plugin(tmp_path / "one", "mine", "idle")
    second = write_layer_plugin(tmp_path / "two", "mine", "other")
    with pytest.raises(PluginError, match="two plugins are called 'mine'") as caught:
        discover([tmp_path / "one", tmp_path / "two"])
    assert str(first) in str(caught.value)
    assert str(second) in str(caught.value)


def test_a_file_named_as_an_installed_plugin(folder: Path) -> None:
    path = write_layer_plugin(folder, "mlp", "idle")
    with (
        only_these(installed("mlp", "workbench_mlp")),
        pytest.raises(PluginError, match="two plugins are called 'mlp'") as caught,
    ):
        discover([folder])
    assert "workbench_mlp" in str(caught.value)
    assert str(path) in str(caught.value)


def test_one_module_under_two_names() -> None:
    points = (installed("one", "workbench_mlp"), installed("two", "workbench_mlp"))
    with only_these(*points), pytest.raises(PluginError, match=r"'two' \(workbench_mlp"):
        discover()


def test_a_misspelled_hook_is_refused(folder: Path) -> None:
    path = write_plugin(folder, "mine", "@hookimpl\ndef register_layer(register): ...")
    with pytest.raises(PluginError, match="Did you mean 'register_layers'") as caught:
        discover([folder])
    assert str(path) in str(caught.value)
    assert "WORKBENCH_DISABLE=mine" in str(caught.value)


def test_a_hook_without_its_mark_is_refused(folder: Path) -> None:
    path = write_plugin(folder, "mine", "def register_layers(register): ...")
    with pytest.raises(PluginError, match=r"mark it with @workbench\.hookimpl") as caught:
        discover([folder])
    assert str(path) in str(caught.value)


def test_a_hook_with_other_arguments_is_refused(folder: Path) -> None:
    path = write_plugin(folder, "mine", "@hookimpl\ndef register_layers(registry): ...")
    with pytest.raises(PluginError, match="registry") as caught:
        discover([folder])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def broken(:", "SyntaxError: invalid syntax"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_skipped(folder: Path, body: str, reason: str) -> None:
    path = write_plugin(folder, "broken", body)
    write_layer_plugin(folder, "good", "idle")
    plugins = discover([folder])
    assert list(plugins.loaded) == ["good"]
    failure = plugins.failures["broken"]
    assert failure.reason.startswith(reason)
    assert str(path) in failure.traceback
    assert body.splitlines()[-1] in failure.traceback


def test_an_installed_plugin_that_cannot_be_imported_is_skipped() -> None:
    with only_these(installed("gone", "no_such_package"), installed("mlp", "workbench_mlp")):
        plugins = discover()
    assert list(plugins.loaded) == ["mlp"]
    assert plugins.failures["gone"].module == "no_such_package"


def test_disable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two", "three"):
        write_layer_plugin(folder, name, name)
    monkeypatch.setenv("WORKBENCH_DISABLE", " one, three,")
    plugins = discover([folder])
    assert list(plugins.loaded) == ["two"]
    assert plugins.disabled == ("one", "three")
    assert list(Builder(plugins).layers) == ["two"]


def test_disable_saves_from_a_plugin_that_raises(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plugin(folder, "mine", "@hookimpl\ndef register_layer(register): ...")
    monkeypatch.setenv("WORKBENCH_DISABLE", "mine")
    assert discover([folder]).loaded == {}


def test_disable_with_a_name_that_no_plugin_has(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_layer_plugin(folder, "mine", "idle")
    monkeypatch.setenv("WORKBENCH_DISABLE", "mind")
    with pytest.raises(UnknownNameError, match=r"WORKBENCH_DISABLE.*Did you mean 'mine'"):
        discover([folder])


def test_a_second_load_reads_the_file_anew(folder: Path) -> None:
    write_layer_plugin(folder, "mine", "before")
    assert list(Builder.load([folder]).layers) == ["before"]
    write_layer_plugin(folder, "mine", "after")
    assert list(Builder.load([folder]).layers) == ["after"]


def test_nothing_stays_of_a_plugin_whose_hook_raises(folder: Path) -> None:
    body = """
    @hookimpl
    def register_layers(register):
        register("half", Idle)
        raise RuntimeError("on the way")
    """
    write_plugin(folder, "mine", body)
    builder = builder_of(folder)
    assert "half" not in builder.layers
    assert list(builder.plugins.failures) == ["mine"]
    assert "mine" not in builder.plugins.loaded
