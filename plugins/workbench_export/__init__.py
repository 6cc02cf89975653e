"""Exports for other people's software: a Hugging Face folder with the model's own code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.hookspecs import hookimpl

if TYPE_CHECKING:
    from workbench.exporter import Exporter
    from workbench.hookspecs import Register


@hookimpl
def register_exporters(register: Register[type[Exporter]]) -> None:
    from workbench_export.huggingface import HuggingFace

    register("huggingface", HuggingFace)
