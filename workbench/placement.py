"""The Placement contract: where each mixer goes. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from workbench.config import NoConfig


class Placement(ABC):
    """A pure function from a number of layers and the mixers offered to one mixer name a layer.

    Class attributes to set:
        Config: a frozen dataclass; fields that name a mixer are annotated `Mixer(kind)`.
        reference: the paper or model it follows.
    """

    Config: ClassVar[type] = NoConfig
    reference: ClassVar[str] = ""

    @classmethod
    @abstractmethod
    def place(cls, num_layers: int, mixers: Sequence[str], config: Any) -> tuple[str, ...]:
        """The mixer of each layer from the input up.

        Args:
            num_layers: how many mixers to place, at least 1.
            mixers: names that the study offers.
            config: an instance of `cls.Config`.

        Returns:
            `num_layers` names, each one of `mixers`.

        Raises:
            FieldError: the config cannot place that many layers; names the field.
        """
