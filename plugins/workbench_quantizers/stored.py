"""Linears whose weights are stored in few bits, and the walk that puts them into a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.layer import Layer
from workbench.quantizer import QuantizationReport


class StoredLinear(nn.Module, ABC):
    """A linear that holds packed weights and unpacks them in every call.

    The bytes saved are real; speed is not: unpacking comes on top of the matrix product, so
    expect it to be slower than the linear it replaces wherever no fused kernel is used (there is
    none on a CPU). It is for inference: gradients reach the inputs and the bias, not the weights.

    Buffers that subclasses add are persistent, so a state dict holds exactly what is stored.
    Convert the model to its final dtype before quantizing: `.to(dtype)` would round the scales.

    Args:
        linear: what is stored; its bias is taken over as it is.
        format: name of the quantizer, for reports.
    """

    weight_packed: Tensor
    weight_scale: Tensor

    def __init__(self, linear: nn.Linear, format: str) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.format = format
        self.bias = linear.bias

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The weights that are computed with, `[out_features, in_features]`, unpacked anew."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed weights and their scales (the bias is not counted)."""
        return self.weight_packed.nbytes + self.weight_scale.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}"
        )


# Gives the stored form of a linear, or says why it has none.
Convert = Callable[[nn.Linear], StoredLinear | str]


@torch.no_grad()
def store_linears(layer: Layer, formats: tuple[str, ...], convert: Convert) -> QuantizationReport:
    """Replace the linears of `layer` in place, and account for every parameter it has.

    `formats` are those that `convert` makes; what another quantizer stored stays as it is.

    Linears that `layer.keep_precision` names, or that lie inside what it names, are left alone;
    so are those that would not become smaller, and everything that is no linear.
    """
    quantized: dict[str, int] = {}
    kept: dict[str, str] = {}
    for name, module in list(layer.named_modules()):
        outcome = _stored(module, name, layer.keep_precision, convert)
        if isinstance(outcome, str):
            kept.update(dict.fromkeys(_names(module, name), outcome))
        elif outcome.format not in formats:
            kept[name] = f"is stored as {outcome.format} already"
        else:
            layer.set_submodule(name, outcome)
            quantized[name] = outcome.weight_bytes
    return QuantizationReport(quantized=quantized, kept=kept)


def _stored(
    module: nn.Module, name: str, keep_precision: Mapping[str, str], convert: Convert
) -> StoredLinear | str:
    """The stored form of a module (itself if it is one), or why it has none."""
    if isinstance(module, StoredLinear):
        return module
    for kept, why in keep_precision.items():
        if name == kept or name.startswith(f"{kept}."):
            return why
    if not isinstance(module, nn.Linear):
        return f"not a linear ({type(module).__name__})"
    stored = convert(module)
    if isinstance(stored, StoredLinear) and stored.weight_bytes >= module.weight.nbytes:
        return f"too small: would take {stored.weight_bytes} bytes, not {module.weight.nbytes}"
    return stored


def _names(module: nn.Module, name: str) -> list[str]:
    """What a report calls a module: its name; the layer itself by its own parameters' names."""
    own = [parameter for parameter, _ in module.named_parameters(recurse=False)]
    return ([name] if own else []) if name else own
