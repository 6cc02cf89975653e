"""The Exporter contract: write a model for other people's software, then prove it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from workbench.config import NoConfig

if TYPE_CHECKING:
    from workbench.builder import Builder
    from workbench.model import HybridLM


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export wrote and how it was checked.

    Attributes:
        path: the folder.
        files: names of what was written.
        max_difference: largest absolute difference of logits between the model and what a fresh
            process computes from the folder.
    """

    path: Path
    files: tuple[str, ...]
    max_difference: float


class Exporter(ABC):
    """Writes a folder and proves it in a fresh process.

    Class attributes to set:
        Config: a frozen dataclass.
    """

    Config: ClassVar[type] = NoConfig

    @classmethod
    @abstractmethod
    def export(
        cls,
        model: HybridLM,
        builder: Builder,
        out: Path,
        config: Any,
        metadata: dict[str, Any],
    ) -> ExportReport:
        """Write `model` to the new folder `out` and verify it.

        Args:
            builder: knows which plugin each layer came from.
            metadata: provenance for the record (study, trial, metrics, versions).

        Raises:
            WorkbenchError: this exporter cannot express the layout (says which block and why),
                `out` is there already, or the reloaded logits differ.
        """
