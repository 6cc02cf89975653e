"""The Quantizer contract: how a block's weights are stored.

A quantizer replaces modules inside one built layer, on any device (the meta device too: byte
counts of an 8 B model cost nothing). What it leaves alone it names, with the reason.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from workbench.config import NoConfig
from workbench.layer import Layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """What a quantizer did to one layer.

    Attributes:
        quantized: submodule name → bytes its weights take now, scales included.
        kept: submodule name → why it was left alone.
    """

    quantized: dict[str, int]
    kept: dict[str, str]


class Quantizer(ABC):
    """Replaces the linears of a layer by modules with fewer bytes.

    Class attributes to set:
        Config: a frozen dataclass.
        reference: the paper or format it follows.
    """

    Config: ClassVar[type] = NoConfig
    reference: ClassVar[str] = ""

    @classmethod
    @abstractmethod
    def quantize(cls, layer: Layer, config: Any) -> QuantizationReport:
        """Replace modules of `layer` in place; must respect `layer.keep_precision`.

        Idempotent: what is quantized already is left as it is.
        """


def num_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and persistent buffers, shared tensors counted once."""
    tensors: dict[int, Tensor] = {}
    for tensor in [*module.parameters(), *module.state_dict(keep_vars=True).values()]:
        tensors[id(tensor)] = tensor
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
