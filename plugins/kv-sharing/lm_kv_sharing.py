"""Attention to the keys and values of an earlier attention block (cross-layer attention).

Cross-layer attention (arXiv:2405.12981) and YOCO (arXiv:2405.05254) save the cache, and the
projections, of every block that reads another's: it makes queries only.

Shape suffixes: B batch, T tokens in this call, D d_model, H query heads, K key-value heads, P head
dim, S keys seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.config import Choice, from_dict
from workbench.costs import Costs
from workbench.errors import FieldError
from workbench.hookspecs import Register, hookimpl
from workbench.layer import PLAIN, Context, Layer, State
from workbench.layout import Block
from workbench_attention.attention import Attention
from workbench_attention.config import AttentionConfig, Heads, check
from workbench_attention.rope import rotary_tables, rotate

SOURCE = "attention"  # the layer whose blocks are read


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVSharingConfig:
    """Queries of its own; whatever shapes keys and values must be as in the block that is read."""

    num_heads: Annotated[int | None, Choice(2, 4, 8, 16), "Query heads; null: d_model/head_dim"] = (
        None
    )
    num_kv_heads: Annotated[int | None, "Key-value heads of the block read; null: num_heads"] = None
    head_dim: Annotated[int | None, "Channels a head; null: d_model/num_heads, or 64"] = None
    position: Annotated[Literal["rope", "none", "alibi"], "Position encoding"] = "rope"
    rope_theta: Annotated[float, "Base of RoPE's frequencies"] = 10000.0
    partial_rotary_factor: Annotated[float, "Share of a head's channels that RoPE turns"] = 1.0
    sliding_window: Annotated[int | None, "Tokens seen, itself included; null: all"] = None

    def attention(self) -> AttentionConfig:
        """The attention that reads its own keys and values instead."""
        return AttentionConfig(**dataclasses.asdict(self))


@dataclasses.dataclass
class Position(State):
    """Where the sequence stands; keys and values are in the other block's state.

    Attributes:
        length: tokens so far, padding included.
        device: of the layer.
        position: after `make_static`, the tokens so far, int64 on the device; `length` then stays
            what it was.
    """

    length: int = 0
    device: torch.device | str | None = None
    position: Tensor | None = None

    def make_static(self) -> None:
        self.position = torch.tensor(self.length, device=self.device)

    def restore(self, before: Position) -> None:
        position = self.position
        super().restore(before)
        if position is not None and before.position is None:
            self.position = position.fill_(before.length)

    def advance(self, num_tokens: int) -> int | Tensor:
        """Where the next tokens start, as a number or a tensor; they count from now on."""
        if self.position is not None:
            start = self.position.clone()
            self.position.add_(num_tokens)
            return start
        self.length += num_tokens
        return self.length - num_tokens


class KVSharingAttention(Layer):
    """Grouped-query attention without keys and values: it reads the nearest attention block's.

    Reads `keys`, `values` and `mask`, as `workbench_attention` publishes them.
    """

    Config = KVSharingConfig
    kind = "attention"
    glyph = "K"
    reference = "cross-layer attention, arXiv:2405.12981"
    output_projection = "o_proj"

    def __init__(self, d_model: int, config: KVSharingConfig, **factory: Any) -> None:
        super().__init__(d_model, config)
        self.attention = config.attention()
        self.heads = Heads.of(d_model, self.attention)
        width = self.heads.queries * self.heads.dim
        self.q_proj = nn.Linear(d_model, width, bias=False, **factory)
        self.o_proj = nn.Linear(width, d_model, bias=False, **factory)

    @classmethod
    def check(cls, d_model: int, config: KVSharingConfig) -> None:
        check(d_model, config.attention())

    @classmethod
    def source(cls, d_model: int, blocks: Sequence[Block]) -> int:
        """The nearest attention block below.

        Raises:
            FieldError: there is none, or its keys and values have another form; names the field.
        """
        found = [index for index, block in enumerate(blocks[:-1]) if block.layer == SOURCE]
        if not found:
            raise FieldError("layer", f"reads an earlier {SOURCE!r} block: place one below it")
        ours = from_dict(KVSharingConfig, blocks[-1].config).attention()
        theirs = from_dict(AttentionConfig, blocks[found[-1]].config)
        _require_equal(_keys_of(d_model, ours), _keys_of(d_model, theirs), found[-1])
        return found[-1]

    @classmethod
    def costs(
        cls, d_model: int, config: KVSharingConfig, *, length: int, bytes_per_element: int = 4
    ) -> Costs:
        heads = Heads.of(d_model, config.attention())
        weights = d_model * heads.kv * heads.dim * 2  # of keys and values, which it has not
        whole = Attention.costs(
            d_model, config.attention(), length=length, bytes_per_element=bytes_per_element
        )
        return dataclasses.replace(
            whole,
            parameters=whole.parameters - weights,
            active_parameters=None,
            own_parameters=None,
            forward_flops=whole.forward_flops - 2 * weights * length,
            decode_flops=whole.decode_flops - 2 * weights,
            state_bytes=0,
        )

    def init_state(self, batch_size: int, max_length: int, **factory: Any) -> Position:
        return Position(device=factory.get("device") or self.q_proj.weight.device)

    def forward(
        self, x_BTD: Tensor, context: Context = PLAIN, state: Position | None = None
    ) -> Tensor:
        if context.source is None:
            raise ValueError("KVSharingAttention needs Context.source")
        q_BTHP = self.q_proj(x_BTD).unflatten(-1, (self.heads.queries, self.heads.dim))
        start = 0 if state is None else state.advance(x_BTD.shape[1])
        if self.attention.position == "rope":
            channels = self.heads.rotary(self.attention)
            theta = self.attention.rope_theta
            q_BTHP = rotate(q_BTHP, *rotary_tables(start, x_BTD.shape[1], channels, theta, q_BTHP))
        keys_BKSP, values_BKSP = context.source["keys"], context.source["values"]
        mask_BHTS = context.source["mask"]
        assert keys_BKSP is not None
        assert values_BKSP is not None
        y_BHTP = F.scaled_dot_product_attention(
            q_BTHP.transpose(1, 2),
            keys_BKSP.to(q_BTHP.dtype),
            values_BKSP.to(q_BTHP.dtype),
            attn_mask=mask_BHTS,
            is_causal=mask_BHTS is None and x_BTD.shape[1] > 1,
            enable_gqa=self.heads.kv != self.heads.queries,
        )
        return self.o_proj(y_BHTP.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _keys_of(d_model: int, config: AttentionConfig) -> dict[str, Any]:
    """What keys, values and masks depend on, by the field that sets it."""
    heads = Heads.of(d_model, config)
    rope = config.position == "rope"
    return {
        "head_dim": heads.dim,
        "num_kv_heads": heads.kv,
        "position": config.position,
        "rope_theta": config.rope_theta if rope else None,
        "partial_rotary_factor": config.partial_rotary_factor if rope else None,
        "sliding_window": config.sliding_window,
        # ALiBi's biases are those of the other block's heads.
        "num_heads": heads.queries if config.position == "alibi" else None,
    }


def _require_equal(ours: dict[str, Any], theirs: dict[str, Any], index: int) -> None:
    for field, value in theirs.items():
        if ours[field] != value:
            raise FieldError(
                field, f"is {ours[field]}, but block {index}, which it reads, has {value}: set both"
            )


@hookimpl
def register_layers(register: Register[type[Layer]]) -> None:
    register("kv-sharing-attention", KVSharingAttention)
