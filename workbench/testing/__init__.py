"""Contract suites for plugin authors: subclass one, supply the class under test, run pytest.

    from workbench.testing import LayerContract

    class TestMyLayer(LayerContract):
        layer = MyLayer
        configs = [MyLayer.Config(), MyLayer.Config(num_heads=8)]

A suite that passes says that the builder, the trainer, the quantizers and the exporters can treat
the plugin's thing like a built-in one. Each test's docstring says what must hold and, after
`Mend:`, what the author must change. `workbench check-plugin` runs them with configs it derives.

Three fixtures come with the installation (see `workbench.testing.pytest_plugin`): `builder`,
`small_layout` and `workbench_study`, which runs a real study in seconds.

Names are loaded on first use: the pytest plugin lives in this package and is imported by every
pytest run on a machine that has the workbench installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.testing.data import DataSourceContract
    from workbench.testing.exporters import ExporterContract
    from workbench.testing.layers import LayerContract
    from workbench.testing.metrics import MetricContract
    from workbench.testing.placements import PlacementContract
    from workbench.testing.presets import PresetContract
    from workbench.testing.quantizers import QuantizerContract

_HOME_OF = {
    "DataSourceContract": "workbench.testing.data",
    "ExporterContract": "workbench.testing.exporters",
    "LayerContract": "workbench.testing.layers",
    "MetricContract": "workbench.testing.metrics",
    "PlacementContract": "workbench.testing.placements",
    "PresetContract": "workbench.testing.presets",
    "QuantizerContract": "workbench.testing.quantizers",
}

__all__ = [
    "DataSourceContract",
    "ExporterContract",
    "LayerContract",
    "MetricContract",
    "PlacementContract",
    "PresetContract",
    "QuantizerContract",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'workbench.testing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
