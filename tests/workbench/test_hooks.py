"""docs/hooks.md is true: every hook is in it, signatures agree, and examples keep the contracts.

Each example is loaded as the plugin file that the text says it is.
"""

from __future__ import annotations

import atexit
import inspect
import shutil
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.workbench.plugin_files import DOCS, builder_of, code_blocks, sections
from workbench import hookspecs
from workbench.builder import Builder
from workbench.config import NoConfig
from workbench.errors import WorkbenchError
from workbench.layout import Layout
from workbench.testing import (
    DataSourceContract,
    ExporterContract,
    LayerContract,
    MetricContract,
    PlacementContract,
    QuantizerContract,
)
from workbench.testing.toys import toy_builder, toy_layout

HOOKS = {name: spec for name, spec in vars(hookspecs).items() if name.startswith("register_")}
DOCUMENT = (DOCS / "hooks.md").read_text(encoding="utf-8")
SECTIONS = sections(DOCUMENT)


@cache
def examples() -> Builder:
    """A builder with the examples of all sections as plugins, and nothing else."""
    folder = Path(tempfile.mkdtemp())  # kept while tests run: exporters read its sources
    atexit.register(shutil.rmtree, folder)
    for hook, text in SECTIONS.items():
        _, example = code_blocks(text)
        (folder / f"{hook}.py").write_text(example, encoding="utf-8")
    return builder_of(folder)


def test_every_hook_has_a_section_and_no_other() -> None:
    assert list(SECTIONS) == list(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_signatures_agree_with_the_code(hook: str) -> None:
    signature = str(inspect.signature(HOOKS[hook])).replace("'", "")
    assert code_blocks(SECTIONS[hook])[0] == f"def {hook}{signature}\n"


@pytest.mark.parametrize("hook", HOOKS)
def test_the_docstring_says_what_the_builder_registers(hook: str) -> None:
    """The hooks are the builder's registries, one each."""
    assert hook.removeprefix("register_") in toy_builder().registries()
    assert "register(" in inspect.getdoc(HOOKS[hook])


def test_examples_load_as_plugin_files() -> None:
    builder = examples()
    assert builder.plugins.failures == {}
    assert set(builder.plugins.loaded) == set(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_each_example_registers_one_thing_of_its_kind(hook: str) -> None:
    registry = examples().registries()[hook.removeprefix("register_")]
    (name,) = registry
    assert registry.provenance(name).plugin == hook
    assert f'register("{name}", ' in SECTIONS[hook]


class TestLayerExample(LayerContract):
    layer = examples().layers["gain"]
    configs = (layer.Config(), layer.Config(start=2.0))


class TestPlacementExample(PlacementContract):
    placement = examples().placements["last-only"]
    configs = (placement.Config(below="mamba", last="attention"),)


class TestQuantizerExample(QuantizerContract):
    quantizer = examples().quantizers["bfloat16"]
    configs = (NoConfig(),)
    max_error = 0.005


class TestMetricExample(MetricContract):
    metric = examples().metrics["largest_block"]
    configs = (NoConfig(),)


class TestDataSourceExample(DataSourceContract):
    source = examples().data_sources["sums"]
    configs = (NoConfig(),)


class TestExporterExample(ExporterContract):
    exporter = examples().exporters["plain"]
    configs = (NoConfig(),)


def test_exporter_example(tmp_path: Path) -> None:
    builder = toy_builder()
    model = builder.build(toy_layout())
    exporter = examples().exporters["plain"]
    report = exporter.export(model, builder, tmp_path / "out", NoConfig(), {"trial": 3})
    assert report.max_difference == 0.0
    assert sorted(path.name for path in report.path.iterdir()) == sorted(report.files)
    assert Layout.read(report.path / "layout.json") == builder.resolve(toy_layout())
    with pytest.raises(WorkbenchError, match="is there already"):
        exporter.export(model, builder, tmp_path / "out", NoConfig(), {})


def test_exporter_examples_proof_would_notice(tmp_path: Path) -> None:
    """The figure in its report is measured: a broken reload shows in it."""
    builder = toy_builder()
    model = builder.build(toy_layout())
    exporter = examples().exporters["plain"]
    report = exporter.export(model, builder, tmp_path / "out", NoConfig(), {})
    impostor = SimpleNamespace(build=lambda layout, seed: _Deaf(builder.build(layout, seed=seed)))
    assert exporter.prove(model, impostor, report.path) > 0.01


class _Deaf:
    """A model that does not take the weights it is given."""

    def __init__(self, model):
        self.model = model

    def load_state_dict(self, weights):
        pass

    def __call__(self, tokens_BT):
        return self.model(tokens_BT)


def test_preset_example(builder: Builder) -> None:
    """With the built-in layers installed, it is a model."""
    preset = examples().presets["tiny-example"]
    assert builder.pattern(preset.layout()) == "M-M-"
    assert builder.costs(preset.layout(), length=1).total.parameters > 0
