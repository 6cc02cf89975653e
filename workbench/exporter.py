"""The Exporter contract: write a model for other people's software, then prove it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from workbench.config import NoConfig
from workbench.errors import WorkbenchError

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


def refuse_unsaved_buffers(model: HybridLM) -> None:
    """Refuse a model of which the state dict is not all.

    Raises:
        WorkbenchError: names the block and its buffer.
    """
    for index, layer in enumerate(model.layers):
        for path, module in layer.named_modules():
            for name in module._non_persistent_buffers_set:
                raise WorkbenchError(
                    f"blocks[{index}] ({model.layout.blocks[index].layer}): buffer "
                    f"{f'{path}.{name}'.lstrip('.')!r} is not saved with the weights and would "
                    "come back as garbage: register it with persistent=True, or compute it in "
                    "forward."
                )


def stored_tensors(model: HybridLM) -> dict[str, Tensor]:
    """The state dict as a safetensors file can hold it: on the CPU, each tied weight once, under
    its first name (`HybridLM.tied` has the others), and no two tensors in one storage."""
    tied = model.tied
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        stored = tensor.detach().cpu().contiguous()
        storage = stored.untyped_storage().data_ptr()
        tensors[name] = stored.clone() if storage in storages else stored
        storages.add(storage)
    return tensors


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written, as with any other file; safetensors has an error of its own.
    """
    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error
