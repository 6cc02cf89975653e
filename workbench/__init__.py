"""Architecture search for small hybrid language models.

    import workbench
    layout = workbench.load_layout("mamba-130m")     # a preset, a JSON file or STUDY:TRIAL
    print(workbench.describe(layout))                # exact parameters, FLOPs, bytes: a row a block
    model = workbench.build(layout)                  # torch module: [B, T] → [B, T, V]

    study = workbench.load_study("quickstart")
    study.frame()                                    # a row a trial
    study.front()                                    # the Pareto-optimal ones

Names are loaded on first use: `import workbench` itself imports neither torch nor pandas.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.api import build, describe, load_layout, load_study
    from workbench.builder import Builder
    from workbench.config import Choice, Mixer, NoConfig, PerLayer, Range
    from workbench.costs import Costs
    from workbench.data import Batch, DataSource
    from workbench.errors import FieldError, PluginError, UnknownNameError, WorkbenchError
    from workbench.exporter import Exporter, ExportReport
    from workbench.hookspecs import hookimpl
    from workbench.layer import Context, Layer, State
    from workbench.layout import Block, Layout, Named
    from workbench.metric import Metric, Subject
    from workbench.model import HybridLM
    from workbench.placement import Placement
    from workbench.preset import Preset
    from workbench.quantizer import QuantizationReport, Quantizer

__version__ = "0.1.0"

_HOMES = {
    "workbench.api": ("build", "describe", "load_layout", "load_study"),
    "workbench.builder": ("Builder",),
    "workbench.config": ("Choice", "Mixer", "NoConfig", "PerLayer", "Range"),
    "workbench.costs": ("Costs",),
    "workbench.data": ("Batch", "DataSource"),
    "workbench.errors": ("FieldError", "PluginError", "UnknownNameError", "WorkbenchError"),
    "workbench.exporter": ("Exporter", "ExportReport"),
    "workbench.hookspecs": ("hookimpl",),
    "workbench.layer": ("Context", "Layer", "State"),
    "workbench.layout": ("Block", "Layout", "Named"),
    "workbench.metric": ("Metric", "Subject"),
    "workbench.model": ("HybridLM",),
    "workbench.placement": ("Placement",),
    "workbench.preset": ("Preset",),
    "workbench.quantizer": ("QuantizationReport", "Quantizer"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Batch", "Block", "Builder", "Choice", "Context", "Costs", "DataSource", "ExportReport",
    "Exporter", "FieldError", "HybridLM", "Layer", "Layout", "Metric", "Mixer", "Named", "NoConfig",
    "PerLayer", "Placement", "PluginError", "Preset", "QuantizationReport", "Quantizer", "Range",
    "State", "Subject", "UnknownNameError", "WorkbenchError", "build", "describe", "hookimpl",
    "load_layout", "load_study",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'workbench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
