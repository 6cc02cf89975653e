"""A real study in seconds over an author's things: what the `workbench_study` fixture runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from workbench import records
from workbench.builder import Builder
from workbench.study import run_study
from workbench.study_config import StudyConfig
from workbench.testing.toys import ToyText

PLUGIN = """import sys

from workbench import hookimpl
"""
HOOK = """

@hookimpl
def register_{kind}(register):
"""
THING = """    register({name!r}, getattr(sys.modules[{module!r}], {attribute!r}))
"""
TOY_DATA = "toy-text"


def tiny_study(
    folder: Path,
    *,
    layers: Sequence[str | type] = ("mamba",),
    placement: str | type = "free",
    mlps: Sequence[str | type] = (),
    quantizers: Sequence[str | type] = (),
    metrics: Sequence[str | type] = (),
    data: str | type | Mapping[str, Any] = TOY_DATA,
    objectives: Sequence[str] = ("perplexity",),
    trials: int = 2,
    d_model: Any = (32, 64),
    num_layers: Any = (1, 2),
    tokens: int = 1024,
    seq_len: int = 32,
    **tables: Any,
) -> records.Study:
    """Run a study in this process and return its record; see the `workbench_study` fixture."""
    threads = torch.get_num_threads()
    named = _Named(folder / "plugins")
    table: dict[str, Any] = dict(data) if isinstance(data, Mapping) else {"source": data}
    table["source"] = named("data_sources", table["source"])
    study = {
        "name": "tiny",
        "objectives": list(objectives),
        "report": [named("metrics", metric) for metric in metrics],
        "space": {
            "d_model": _listed(d_model),
            "num_layers": _listed(num_layers),
            "mixers": [named("layers", layer) for layer in layers],
            "placements": [named("placements", placement)],
            "mlps": [named("layers", mlp) for mlp in mlps] or ["none"],
            "quantizers": [named("quantizers", each) for each in quantizers] or ["none"],
        },
        "data": table,
        "training": {"tokens": tokens, "batch_size": 4, "seq_len": seq_len, "lr": 1e-2},
        "budget": {"trials": trials},
        "runtime": {"device": "cpu", "executor": "inline", "threads": 1},
        "plugin_dirs": [str(named.write())],
    }
    for name, value in tables.items():
        given = study.get(name)
        study[name] = {**given, **value} if isinstance(given, Mapping) else value
    try:
        return run_study(StudyConfig.from_dict(study), folder / "runs")
    finally:
        torch.set_num_threads(threads)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class _Named:
    """Names of things: those registered already, and classes that a file of its own registers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.builder = Builder.load()
        self.new: dict[str, dict[str, type]] = {"data_sources": {TOY_DATA: ToyText}}

    def __call__(self, kind: str, thing: str | type) -> str:
        if isinstance(thing, str):
            return thing
        registry = self.builder.registries()[kind]
        for name in registry:
            if registry[name] is thing:
                return name
        name = _own_name(kind, thing) or f"tested-{thing.__qualname__.lower()}"
        self.new.setdefault(kind, {})[name] = thing
        return name

    def write(self) -> Path:
        """The folder of the file that registers what is new."""
        text = PLUGIN
        for kind, things in self.new.items():
            text += HOOK.format(kind=kind)
            for name, thing in things.items():
                _require_reachable(thing)
                text += THING.format(
                    name=name, module=thing.__module__, attribute=thing.__qualname__
                )
        self.folder.mkdir(parents=True)
        (self.folder / "under_test.py").write_text(text, encoding="utf-8")
        return self.folder


def _own_name(kind: str, thing: type) -> str | None:
    """What the hook of the thing's module would call it, once that is installed."""
    names: dict[str, Any] = {}
    hook = getattr(sys.modules.get(thing.__module__), f"register_{kind}", None)
    if hook is not None:
        hook(names.__setitem__)
    return next((name for name, registered in names.items() if registered is thing), None)


def _require_reachable(thing: type) -> None:
    module = sys.modules.get(thing.__module__)
    if getattr(module, thing.__qualname__, None) is not thing:
        raise ValueError(
            f"workbench_study cannot reach {thing.__qualname__}: define it at the top level of a "
            "module, not inside a function."
        )
