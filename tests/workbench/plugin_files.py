"""Plugins as text, and the fence that keeps the installed ones out of a test."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from unittest.mock import patch

import workbench

DOCS = Path(__file__).parents[2] / "docs"

HEADER = """
from dataclasses import dataclass
from workbench import Costs, Layer, Metric, hookimpl

class Idle(Layer):
    glyph = "i"
    kind = "mlp"
    def forward(self, x_BTD, context=None, state=None):
        return x_BTD
    @classmethod
    def costs(cls, d_model, config, *, length, bytes_per_element=4):
        return Costs()
"""


def write_plugin(folder: Path, name: str, body: str) -> Path:
    """`folder/name.py` with a do-nothing layer `Idle` and `body`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.py"
    path.write_text(HEADER + textwrap.dedent(body))
    return path


def write_layer_plugin(folder: Path, name: str, layer: str) -> Path:
    """A plugin that offers `Idle` under the name `layer`."""
    body = f"""
    @hookimpl
    def register_layers(register):
        register({layer!r}, Idle)
    """
    return write_plugin(folder, name, body)


@contextmanager
def only_these(*points: EntryPoint) -> Iterator[None]:
    """Inside, the installed plugins are the given entry points."""
    with patch("workbench.discovery.entry_points", lambda: EntryPoints(points)):
        yield


def builder_of(folder: Path) -> workbench.Builder:
    """A builder with the plugins of one folder and no installed one."""
    with only_these():
        return workbench.Builder.load([folder])


def code_blocks(document: str, language: str = "python") -> list[str]:
    """The fenced code blocks of a Markdown text, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document, flags=re.M | re.S)


def sections(document: str) -> dict[str, str]:
    """The text under each `## ` heading."""
    _, *parts = re.split(r"^## ", document, flags=re.M)
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in parts}
