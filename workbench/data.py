"""The DataSource contract: token batches, deterministic under a seed.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from workbench.config import NoConfig
from workbench.layer import PLAIN, Context


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Inputs and next-token targets.

    Attributes:
        inputs_BT, targets_BT: int64 token ids; a target of -100 carries no loss.
        num_bytes: bytes of text that the targets stand for, for bits per byte; None where the
            tokens stand for no text (synthetic tasks).
        context: document borders and the like.
    """

    inputs_BT: Tensor
    targets_BT: Tensor
    num_bytes: float | None = None
    context: Context = PLAIN

    @property
    def is_plain(self) -> bool:
        """Whether the context says nothing: inputs and targets are all there is."""
        context = self.context
        return all(getattr(context, f.name) is None for f in dataclasses.fields(context))

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same batch in page-locked memory."""
        return self._with_each(lambda tensor: tensor.pin_memory())

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {
            field.name: change(value)
            for field in dataclasses.fields(self.context)
            if (value := getattr(self.context, field.name)) is not None
        }
        return dataclasses.replace(
            self,
            inputs_BT=change(self.inputs_BT),
            targets_BT=change(self.targets_BT),
            context=dataclasses.replace(self.context, **changed),
        )


class DataSource(ABC):
    """Where tokens come from. Constructed once a process; may cache under `cache_dir`.

    Class attributes to set:
        Config: a frozen dataclass.

    Args:
        config: an instance of `Config`.
        seed: decides the split where the source makes one, and which train batch a step gets.
        cache_dir: a folder the source may fill; contents must not depend on who fills it.

    Raises (from the constructor):
        WorkbenchError: the data is missing or unusable; says what to do.
    """

    Config: ClassVar[type] = NoConfig

    def __init__(self, config: Any, *, seed: int = 0, cache_dir: Path) -> None:
        self.config = config
        self.seed = seed
        self.cache_dir = cache_dir

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Token ids are below this."""

    @abstractmethod
    def train_batch(self, step: int, batch_size: int, length: int) -> Batch:
        """The training batch of a step: a pure function of (seed, step, batch_size, length)."""

    @abstractmethod
    def validation_batches(self, batch_size: int, length: int) -> Iterator[Batch]:
        """The whole validation part once, in a fixed order, disjoint from the training part."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """JSON facts for the record: sizes of the parts, a content hash, versions."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
            WorkbenchError: the source holds no text.
        """
        raise self._no_text()

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids.

        Raises:
            WorkbenchError: the source holds no text.
        """
        raise self._no_text()

    def _no_text(self) -> Exception:
        from workbench.errors import WorkbenchError

        return WorkbenchError(f"{type(self).__name__} holds no text: give token ids instead.")
