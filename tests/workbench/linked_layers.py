"""Layers that build on earlier blocks, add losses, norm their own input; the least of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from workbench.costs import Costs
from workbench.errors import FieldError
from workbench.layer import PLAIN, Layer
from workbench.testing.toy_layers import ToyMLP


class SharedMLP(ToyMLP):
    """One pair of linears for all depths, a scale of each depth's own."""

    shared = ("up_proj", "down_proj")

    def __init__(self, d_model, config, **factory: Any) -> None:
        super().__init__(d_model, config, **factory)
        self.scale_D = nn.Parameter(torch.empty(d_model, **factory))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale_D)

    @classmethod
    def source(cls, d_model, blocks):
        first = list(blocks).index(blocks[-1])
        return first if first < len(blocks) - 1 else None

    @classmethod
    def costs(cls, d_model, config, *, length, bytes_per_element=4) -> Costs:
        costs = super().costs(d_model, config, length=length)
        return costs + Costs(
            parameters=d_model,
            own_parameters=d_model - costs.parameters,
            forward_flops=length * d_model,
            decode_flops=d_model,
        )

    def forward(self, x_BTD, context=PLAIN, state=None):
        return super().forward(x_BTD) * self.scale_D


class Publisher(ToyMLP):
    """Publishes `values_BTD`, its outputs."""

    def forward(self, x_BTD, context=PLAIN, state=None):
        y_BTD = super().forward(x_BTD)
        context.publish(values_BTD=y_BTD)
        return y_BTD


class Reader(Layer):
    """Adds what the nearest publisher published, and the embedding, each by its own weights."""

    kind = "mlp"
    glyph = "r"
    reference = "none"

    def __init__(self, d_model, config, **factory: Any) -> None:
        super().__init__(d_model, config)
        self.weights_2D = nn.Parameter(torch.empty(2, d_model, **factory))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weights_2D)

    @classmethod
    def source(cls, d_model, blocks):
        for index in reversed(range(len(blocks))):
            if blocks[index].layer == "publisher":
                return index
        raise FieldError("layer", "place a publisher before it")

    @classmethod
    def costs(cls, d_model, config, *, length, bytes_per_element=4) -> Costs:
        return Costs(parameters=2 * d_model, forward_flops=length * d_model, decode_flops=d_model)

    def forward(self, x_BTD, context=PLAIN, state=None):
        assert context.source is not None
        read_2BTD = torch.stack([context.source["values_BTD"], context.embedding_BTD])
        return x_BTD + (self.weights_2D[:, None, None] * read_2BTD).sum(0)


class Loser(ToyMLP):
    """Adds the mean square of its outputs to the loss."""

    def forward(self, x_BTD, context=PLAIN, state=None):
        y_BTD = super().forward(x_BTD)
        context.add_loss(y_BTD.square().mean())
        return y_BTD


class BareMLP(ToyMLP):
    pre_norm = False
