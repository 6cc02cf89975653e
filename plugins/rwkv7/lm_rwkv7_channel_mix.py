"""The channel mix of RWKV-7 "Goose", its MLP, as a workbench plugin.

Peng et al., arXiv:2503.14456. Parameters are named and shaped as in the authors' checkpoints
(`blocks.0.ffn.`), which load as they are. Shape suffixes: B batch, T tokens, D d_model.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.config import Range
from workbench.costs import Costs
from workbench.errors import FieldError
from workbench.hookspecs import Register, hookimpl
from workbench.layer import PLAIN, Context, Kind, Layer, State

MULTIPLE = 32  # inner widths are rounded down to one of it, as published


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelMixConfig:
    """Width of RWKV-7's channel mix."""

    intermediate_size: Annotated[
        int | None, "Inner width; null: expand * d_model, rounded down to a multiple of 32"
    ] = None
    expand: Annotated[float, Range(1.0, 6.0), "Inner width over d_model"] = 4.0
    depth: Annotated[float, "Place in the stack, above 0 to 1, that initial weights are for"] = 0.5

    def width(self, d_model: int) -> int:
        """The inner width."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return max(1, int(self.expand * d_model) // MULTIPLE) * MULTIPLE


@dataclasses.dataclass
class ChannelMixState(State):
    """The last token's input."""

    shift_BD: Tensor


class ChannelMix(Layer):
    """RWKV-7's MLP, squared ReLU on each token mixed with the one before it.

    It sees the token before, so its kind is "recurrent"; a study lists it under `mlps`.
    """

    Config: ClassVar[type] = ChannelMixConfig
    kind: ClassVar[Kind] = "recurrent"
    glyph = "r"
    reference = "arXiv:2503.14456; RWKV-LM RWKV_CMix_x070"
    output_projection = "value"

    def __init__(
        self,
        d_model: int,
        config: ChannelMixConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, config)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = config.width(d_model)
        self.x_k = nn.Parameter(torch.empty(1, 1, d_model, **factory))
        self.key = nn.Linear(d_model, width, bias=False, **factory)
        self.value = nn.Linear(width, d_model, bias=False, **factory)

    @classmethod
    def check(cls, d_model: int, config: ChannelMixConfig) -> None:
        if config.intermediate_size is not None and config.intermediate_size < 1:
            raise FieldError(
                "intermediate_size", f"must be at least 1, or null, got {config.intermediate_size}"
            )
        if config.expand <= 0:
            raise FieldError("expand", f"must be above 0, got {config.expand}")
        if not 0 < config.depth <= 1:
            raise FieldError("depth", f"must be above 0 and at most 1, got {config.depth}")

    @classmethod
    def costs(
        cls, d_model: int, config: ChannelMixConfig, *, length: int, bytes_per_element: int = 4
    ) -> Costs:
        weights = 2 * d_model * config.width(d_model)
        return Costs(
            parameters=weights + d_model,
            forward_flops=2 * weights * length,
            decode_flops=2 * weights,
            state_bytes=d_model * bytes_per_element,
            decode_state_bytes=2 * d_model * bytes_per_element,
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As published for a block at `depth` of the stack; the output starts at zero."""
        width = self.d_model
        channel = torch.arange(width, device=self.x_k.device, dtype=torch.float32)
        self.x_k.copy_(1 - (channel / width) ** (1 - self.config.depth) ** 4)
        nn.init.uniform_(self.key.weight, -0.5 / width**0.5, 0.5 / width**0.5)
        nn.init.zeros_(self.value.weight)

    def init_state(
        self,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ChannelMixState:
        """Zeros; its size does not depend on `max_length`."""
        weight = self.key.weight
        device = weight.device if device is None else device
        shape = (batch_size, self.d_model)
        return ChannelMixState(torch.zeros(shape, device=device, dtype=dtype or weight.dtype))

    def forward(
        self, x_BTD: Tensor, context: Context = PLAIN, state: ChannelMixState | None = None
    ) -> Tensor:
        x_BTD = context.mask_padding(x_BTD)
        last_BD = torch.zeros_like(x_BTD[:, 0]) if state is None else state.shift_BD
        previous_BTD = torch.cat((last_BD[:, None].to(x_BTD.dtype), x_BTD[:, :-1]), 1)
        if context.seq_idx_BT is not None:
            starts_BT = context.seq_idx_BT.diff(dim=1, prepend=context.seq_idx_BT[:, :1]) != 0
            previous_BTD = previous_BTD.masked_fill(starts_BT[..., None], 0.0)
        if state is not None:
            state.shift_BD.copy_(x_BTD[:, -1].detach())
        inner = F.relu(self.key(x_BTD + (previous_BTD - x_BTD) * self.x_k)).square()
        return self.value(inner)  # type: ignore[no-any-return]


@hookimpl
def register_layers(register: Register[type[Layer]]) -> None:
    register("rwkv7-channel-mix", ChannelMix)
