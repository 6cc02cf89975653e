"""Data sources: standard-library sources, text files, Hugging Face data sets, synthetic recall."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.hookspecs import Register, hookimpl

if TYPE_CHECKING:
    from workbench.data import DataSource


@hookimpl
def register_data_sources(register: Register[type[DataSource]]) -> None:
    from workbench_data.hub import HubDataset
    from workbench_data.mqar import MultiQueryRecall
    from workbench_data.stdlib import StandardLibrary
    from workbench_data.text import TextFiles

    register("stdlib", StandardLibrary)
    register("text", TextFiles)
    register("hub", HubDataset)
    register("mqar", MultiQueryRecall)
