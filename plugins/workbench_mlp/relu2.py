"""The MLP with squared ReLU of Primer (arXiv:2109.08668), as in Nemotron-H.

Weights are named as in transformers' NemotronHMLP. Shape suffixes: B batch, T tokens, D d_model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.config import Range
from workbench.costs import Costs
from workbench.layer import PLAIN, Context, Layer, State
from workbench_mlp.width import check, costs, intermediate_size


@dataclass(frozen=True, kw_only=True)
class ReLU2MLPConfig:
    """Width of a squared-ReLU MLP."""

    intermediate_size: Annotated[
        int | None, "Inner width; null: expand * d_model rounded up to multiple_of"
    ] = None
    expand: Annotated[float, Range(1.0, 6.0), "Inner width over d_model"] = 4.0
    multiple_of: Annotated[int, "The inner width is rounded up to a multiple of it"] = 32
    bias: Annotated[bool, "Biases on both projections"] = False


class ReLU2MLP(Layer):
    """`down_proj(relu(up_proj(x)) ** 2)`."""

    Config = ReLU2MLPConfig
    kind = "mlp"
    glyph = "="
    reference = "arXiv:2109.08668; transformers NemotronHMLP"
    output_projection = "down_proj"

    def __init__(
        self,
        d_model: int,
        config: ReLU2MLPConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, config)
        width = intermediate_size(d_model, config)
        factory: dict[str, Any] = {"bias": config.bias, "device": device, "dtype": dtype}
        self.up_proj = nn.Linear(d_model, width, **factory)
        self.down_proj = nn.Linear(width, d_model, **factory)

    @classmethod
    def check(cls, d_model: int, config: ReLU2MLPConfig) -> None:
        check(d_model, config)

    @classmethod
    def costs(
        cls, d_model: int, config: ReLU2MLPConfig, *, length: int, bytes_per_element: int = 4
    ) -> Costs:
        return costs(d_model, config, num_inner=1, length=length)

    def forward(
        self, x_BTD: Tensor, context: Context = PLAIN, state: State | None = None
    ) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(x_BTD)).square())  # type: ignore[no-any-return]

    def step(self, x_BD: Tensor, state: State, context: Context = PLAIN) -> Tensor:
        return self.forward(x_BD)
