"""The contract suites of what a plugin registers, with configs derived: what check-plugin runs."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Container, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from workbench.builder import Builder, default_builder
from workbench.data import DataSource
from workbench.errors import FieldError, WorkbenchError
from workbench.layer import Layer
from workbench.testing import events
from workbench.testing.blame import own_files
from workbench.testing.configs import ConfigContract
from workbench.testing.data import DataSourceContract
from workbench.testing.derived import UnderivableError, derived_configs
from workbench.testing.exporters import ExporterContract
from workbench.testing.layers import LayerContract
from workbench.testing.metrics import MetricContract
from workbench.testing.placements import DEPTHS, PlacementContract
from workbench.testing.presets import PresetContract
from workbench.testing.quantizers import QuantizerContract
from workbench.testing.surroundings import Surroundings

CONTRACTS: dict[str, type] = {
    "layers": LayerContract,
    "placements": PlacementContract,
    "quantizers": QuantizerContract,
    "metrics": MetricContract,
    "data_sources": DataSourceContract,
    "exporters": ExporterContract,
    "presets": PresetContract,
}
WIDTHS = (32, 64, 128, 256)  # the first at which a layer's defaults can be built is taken
LARGEST = 1_000_000  # parameters: beyond, finite differences are no longer quick
LOSSLESS = 1.0  # of a quantizer's outputs: how much its format may lose, its author's suite says


def suites(
    plugins: Iterable[str], plugin_dirs: Sequence[str], left_out: Container[str] = ()
) -> dict[str, type]:
    """A test class for each thing that the plugins registered, by class name.

    Args:
        left_out: labels of things (`layer mamba`) that get none.
    """
    builder, wanted = default_builder(tuple(plugin_dirs)), set(plugins)
    found = {}
    for kind, registry in builder.registries().items():
        for name in registry:
            if registry.provenance(name).plugin in wanted and _label(kind, name) not in left_out:
                thing = registry[name]
                events.tell("deriving", thing=_label(kind, name), own=str(own_files(thing)))
                suite = suite_of(kind, name, thing, builder)
                found[suite.__name__] = suite
    events.tell("collecting")
    return found


def _label(kind: str, name: str) -> str:
    return f"{kind.removesuffix('s').replace('_', ' ')} {name}"


def suite_of(kind: str, name: str, thing: Any, builder: Builder) -> type:
    """The contract suite of one thing.

    Where no config can be derived, its only test says so: skipped if the author's tests must
    bring configs, failed if the search space, or the thing's code, is at fault.
    """
    contract: Any = CONTRACTS[kind]
    label = _label(kind, name)
    attributes: dict[str, Any] = {contract.under_test: thing, "derived": label}
    bases: tuple[type, ...] = (contract,)
    try:
        match kind:
            case "presets":
                attributes["builder"] = lambda self: builder
            case "layers":
                attributes |= _layer(name, thing, builder)
            case "placements":
                attributes["configs"] = derived_configs(thing.Config, partial(_places, thing))
            case "data_sources":
                attributes["configs"] = derived_configs(thing.Config, partial(_yields, thing))
            case _:
                attributes["configs"] = derived_configs(thing.Config, lambda config: True)
        if kind == "quantizers":
            attributes["max_error"] = LOSSLESS
    except Exception as error:
        bases = (NoConfigs,)
        attributes |= {"under_test": contract.under_test, "refusal": error, "contract": contract}
    return type(f"Test{re.sub(r'[^A-Za-z0-9]+', '_', label).title()}", bases, attributes)


class NoConfigs:
    """Stands for a suite that has no configs to run with."""

    under_test: str
    refusal: Exception
    contract: type[ConfigContract]

    def test_configs(self) -> None:
        """A config can be made of defaults and search ranges, or the package's tests bring some.

        Mend: Give the field a default or a search range, or subclass the contract in a test file
        with `configs` of your own, and name that file with `--tests`.
        """
        if not isinstance(self.refusal, WorkbenchError):
            raise self.refusal
        text = f"{self.refusal}: no config to run {self.contract.__name__} with"
        if isinstance(self.refusal, UnderivableError):
            pytest.skip(text)
        pytest.fail(text)


def _layer(name: str, layer: type[Layer], builder: Builder) -> dict[str, Any]:
    """Width, configs and surroundings at which a layer can be built."""
    refusal: WorkbenchError | None = None
    for d_model in WIDTHS:
        try:
            found = derived_configs(layer.Config, partial(_fits, layer, d_model))
        except FieldError as error:
            refusal = error
            continue
        return {"d_model": d_model, **Surroundings(name, layer, builder, d_model).attributes(found)}
    assert refusal is not None
    raise refusal


def _fits(layer: type[Layer], d_model: int, config: Any) -> bool:
    layer.check(d_model, config)
    return layer.costs(d_model, config, length=1).parameters <= LARGEST


def _places(placement: Any, config: Any) -> bool:
    for num_layers in DEPTHS:
        try:
            placement.place(num_layers, PlacementContract.mixers, config)
        except FieldError:
            continue
        return True
    return False


def _yields(source: type[DataSource], config: Any) -> bool:
    """Whether batches of the suite's size can be drawn; a FieldError says that they cannot."""
    with tempfile.TemporaryDirectory(prefix="workbench-check-") as folder:
        made = source(config, seed=0, cache_dir=Path(folder))
        made.train_batch(0, DataSourceContract.batch_size, DataSourceContract.length)
    return True
