"""The smallest honest layers: subjects for tests of quantizers, exporters and tools.

Shape suffixes: B batch, T tokens, D d_model, I inner width.

A module of their own, so that an exporter can put them into a model folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from workbench.config import Choice, NoConfig
from workbench.costs import Costs
from workbench.layer import PLAIN, Context, Layer, State


@dataclasses.dataclass
class ToyState(State):
    average_BI: Tensor


class ToyMixer(Layer):
    """A gated moving average, `h_t = a h_{t-1} + (1 - a) in_proj(x_t)`, token by token."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        expand: Annotated[int, Choice(1, 2), "inner width over d_model"] = 1

    kind = "recurrent"
    glyph = "t"
    reference = "exponential smoothing (Brown 1956), gated"
    keep_precision: ClassVar[Mapping[str, str]] = {"gate_proj": "it squashes what it lets through"}
    output_projection = "out_proj"

    def __init__(self, d_model: int, config: Config, **factory: Any) -> None:
        super().__init__(d_model, config)
        inner = config.expand * d_model
        self.in_proj = nn.Linear(d_model, inner, **factory)
        self.gate_proj = nn.Linear(d_model, inner, bias=False, **factory)
        self.out_proj = nn.Linear(inner, d_model, bias=False, **factory)
        self.decay_I = nn.Parameter(torch.empty(inner, **factory))

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.decay_I, 0.0, 2.0)

    @classmethod
    def costs(
        cls, d_model: int, config: Config, *, length: int, bytes_per_element: int = 4
    ) -> Costs:
        inner = config.expand * d_model
        linears, smoothing = 3 * d_model * inner, 4 * inner
        return Costs(
            parameters=linears + 2 * inner,
            forward_flops=length * (2 * linears + smoothing),
            decode_flops=2 * linears + smoothing,
            state_bytes=inner * bytes_per_element,
            decode_state_bytes=2 * inner * bytes_per_element,
        )

    def init_state(self, batch_size: int, max_length: int, **factory: Any) -> ToyState:
        return ToyState(torch.zeros(batch_size, len(self.decay_I), **factory))

    def forward(
        self, x_BTD: Tensor, context: Context = PLAIN, state: ToyState | None = None
    ) -> Tensor:
        state = state or self.init_state(x_BTD.shape[0], 0, device=x_BTD.device, dtype=x_BTD.dtype)
        a_I = self.decay_I.sigmoid()
        inputs_BTI = context.mask_padding(self.in_proj(x_BTD)) * (1 - a_I)
        keep_BT1 = _same_document(x_BTD, context)[..., None]
        averages = []
        for t in range(x_BTD.shape[1]):
            state.average_BI = a_I * state.average_BI * keep_BT1[:, t] + inputs_BTI[:, t]
            averages.append(state.average_BI)
        gated_BTI = torch.stack(averages, dim=1) * self.gate_proj(x_BTD).sigmoid()
        y_BTD: Tensor = self.out_proj(gated_BTI)
        return y_BTD


def _same_document(x_BTD: Tensor, context: Context) -> Tensor:
    """`[B, T]` of the inputs' dtype: 0 where a document starts inside the row, else 1."""
    same_BT = x_BTD.new_ones(x_BTD.shape[:2])
    if context.seq_idx_BT is not None:
        same_BT[:, 1:] = (context.seq_idx_BT.diff(dim=1) == 0).to(x_BTD.dtype)
    return same_BT


class ToyMLP(Layer):
    """`down_proj(relu(up_proj(x)))`."""

    kind = "mlp"
    glyph = "."
    reference = "any textbook"
    output_projection = "down_proj"

    def __init__(self, d_model: int, config: NoConfig, **factory: Any) -> None:
        super().__init__(d_model, config)
        self.up_proj = nn.Linear(d_model, 2 * d_model, bias=False, **factory)
        self.down_proj = nn.Linear(2 * d_model, d_model, bias=False, **factory)

    @classmethod
    def costs(
        cls, d_model: int, config: NoConfig, *, length: int, bytes_per_element: int = 4
    ) -> Costs:
        parameters = 4 * d_model**2
        return Costs(
            parameters=parameters,
            forward_flops=2 * length * parameters,
            decode_flops=2 * parameters,
        )

    def forward(self, x_BTD: Tensor, context: Context = PLAIN, state: Any = None) -> Tensor:
        y_BTD: Tensor = self.down_proj(self.up_proj(x_BTD).relu())
        return y_BTD
