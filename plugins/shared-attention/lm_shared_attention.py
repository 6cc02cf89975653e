"""A transformer block whose weights serve several depths (Zamba2, arXiv:2411.15242), as layers.

`shared-attention` writes what the block says to the residual stream; `zamba2` adds it to the input
of a Mamba-2, as Zamba2's hybrid layers do. Every depth has adapters (LoRA) and a projection of its
own; blocks of equal Config share the rest, so a layout with two groups alternates two blocks.

Shape suffixes: B batch, T tokens in this call, D d_model, W = 2 D (stream and embedding side by
side), C channels of queries, keys and values together, F inner width of the MLP.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.config import Choice, Range
from workbench.costs import Costs
from workbench.errors import FieldError
from workbench.hookspecs import Register, hookimpl
from workbench.layer import PLAIN, Context, Layer, State
from workbench.layout import Block, Layout
from workbench.preset import Preset
from workbench_attention.attention import Attention
from workbench_attention.cache import KVCache
from workbench_attention.config import AttentionConfig
from workbench_mamba.mamba2 import Mamba2, Mamba2Config, Mamba2State


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedAttentionConfig:
    """The shared block, named as in transformers' Zamba2Config, and each depth's adapters."""

    num_heads: Annotated[int, Choice(2, 4, 8, 16), "Query heads, 2 d_model / num_heads wide"] = 8
    num_kv_heads: Annotated[int | None, Choice(1, 2, 4), "Key-value heads; null: num_heads"] = None
    position: Annotated[Literal["none", "rope"], Choice("none", "rope"), "Position encoding"] = (
        "rope"
    )
    rope_theta: Annotated[float, "Base of RoPE's frequencies"] = 10000.0
    expand: Annotated[int, Choice(1, 2, 4), "Inner width of the MLP over d_model"] = 4
    adapter_rank: Annotated[int, Choice(8, 16, 32), "Rank of each depth's adapters"] = 16
    attention_adapter: Annotated[bool, Choice(False, True), "Adapters on q, k and v, too"] = False
    group: Annotated[int, Range(0, 1), "Blocks of one group share their weights"] = 0
    norm_eps: Annotated[float, "Added to the mean square in the norms"] = 1e-5

    def attention(self, d_model: int) -> AttentionConfig:
        """What the shared attention is, on inputs of 2 d_model channels."""
        return AttentionConfig(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            position=self.position,
            rope_theta=self.rope_theta,
            # Half a head's channels come from the stream: Zamba2 scales by them alone.
            scale=(d_model / self.num_heads) ** -0.5,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Zamba2Config(SharedAttentionConfig):
    """The shared block, and the Mamba-2 that it feeds."""

    d_state: Annotated[int, Choice(16, 32, 64, 128), "Mamba-2's state size"] = 64
    headdim: Annotated[int, Choice(32, 64, 128), "Channels of a Mamba-2 head"] = 64
    n_groups: Annotated[int, Choice(1, 2, 4), "Groups of heads that share B and C"] = 1
    chunk_size: Annotated[int, "Tokens computed as one matrix: speed only, not results"] = 64

    def mamba(self) -> Mamba2Config:
        """The Mamba-2's own Config."""
        return Mamba2Config(
            d_state=self.d_state,
            headdim=self.headdim,
            n_groups=self.n_groups,
            chunk_size=self.chunk_size,
            norm_eps=self.norm_eps,
        )


class AdaptedAttention(Attention):
    """Attention from 2 D channels to D; its input may bring what adapters add to q, k and v."""

    def __init__(self, d_model: int, config: AttentionConfig, **factory: Any) -> None:
        super().__init__(2 * d_model, config, device="meta")
        heads, wide = self.heads, 2 * d_model
        self.q_proj = nn.Linear(wide, heads.queries * heads.dim, bias=False, **factory)
        self.k_proj = nn.Linear(wide, heads.kv * heads.dim, bias=False, **factory)
        self.v_proj = nn.Linear(wide, heads.kv * heads.dim, bias=False, **factory)
        self.o_proj = nn.Linear(heads.queries * heads.dim, d_model, bias=False, **factory)

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels of queries, keys and values."""
        kv_width = self.heads.kv * self.heads.dim
        return self.heads.queries * self.heads.dim, kv_width, kv_width

    def _project(self, x_BTC: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_BTW, added_BTC = x_BTC.tensor_split((self.d_model,), dim=-1)
        qkv = [self.q_proj(x_BTW), self.k_proj(x_BTW), self.v_proj(x_BTW)]
        if added_BTC.shape[-1]:
            parts = added_BTC.split_with_sizes(self.widths, dim=-1)
            qkv = [x + part for x, part in zip(qkv, parts, strict=True)]
        return self._in_heads(*qkv, start)


class SharedTransformer(nn.Module):
    """Norm, attention, norm and gated MLP without residuals: what the depths have in common."""

    def __init__(self, d_model: int, config: SharedAttentionConfig, **factory: Any) -> None:
        super().__init__()
        inner = config.expand * d_model
        self.input_norm = nn.RMSNorm(2 * d_model, eps=config.norm_eps, **factory)
        self.attention = AdaptedAttention(d_model, config.attention(d_model), **factory)
        self.mlp_norm = nn.RMSNorm(d_model, eps=config.norm_eps, **factory)
        self.gate_up_proj = nn.Linear(d_model, 2 * inner, bias=False, **factory)
        self.down_proj = nn.Linear(inner, d_model, bias=False, **factory)

    def reset_parameters(self) -> None:
        self.input_norm.reset_parameters()
        self.mlp_norm.reset_parameters()


class SharedAttention(Layer):
    """The shared block of the stream beside the embedding, through a projection of its depth's own.

    Expects `Context.embedding_BTD`. The block's attention caches the keys and values of each depth.
    """

    Config = SharedAttentionConfig
    kind = "attention"
    glyph = "S"
    reference = "Zamba2, arXiv:2411.15242; transformers Zamba2AttentionDecoderLayer"
    output_projection = "linear"
    pre_norm = False
    shared = ("transformer",)

    def __init__(self, d_model: int, config: SharedAttentionConfig, **factory: Any) -> None:
        super().__init__(d_model, config)
        self.transformer = SharedTransformer(d_model, config, **factory)
        rank, inner = config.adapter_rank, config.expand * d_model
        self.mlp_adapter = _adapter(d_model, rank, 2 * inner, **factory)
        if config.attention_adapter:
            self.attention_adapters = nn.ModuleList(
                _adapter(2 * d_model, rank, width, **factory)
                for width in self.transformer.attention.widths
            )
        self.linear = nn.Linear(d_model, d_model, bias=False, **factory)

    @classmethod
    def check(cls, d_model: int, config: SharedAttentionConfig) -> None:
        for name in ("expand", "adapter_rank"):
            if getattr(config, name) < 1:
                raise FieldError(name, f"must be at least 1, got {getattr(config, name)}")
        if config.norm_eps <= 0:
            raise FieldError("norm_eps", f"must be above 0, got {config.norm_eps}")
        if config.num_heads < 1:
            raise FieldError("num_heads", f"must be at least 1, got {config.num_heads}")
        Attention.check(2 * d_model, config.attention(d_model))

    @classmethod
    def source(cls, d_model: int, blocks: Sequence[Block]) -> int | None:
        """The first block like this one, if that is an earlier one."""
        first = list(blocks).index(blocks[-1])
        return first if first < len(blocks) - 1 else None

    @classmethod
    def costs(
        cls,
        d_model: int,
        config: SharedAttentionConfig,
        *,
        length: int,
        bytes_per_element: int = 4,
    ) -> Costs:
        attention = Attention.costs(
            2 * d_model,
            config.attention(d_model),
            length=length,
            bytes_per_element=bytes_per_element,
        )
        wide, inner, rank = 2 * d_model, config.expand * d_model, config.adapter_rank
        kv_heads = config.num_heads if config.num_kv_heads is None else config.num_kv_heads
        channels = wide + 2 * kv_heads * (wide // config.num_heads)  # of q, k and v
        # The attention's output has D channels, not the 2 D that its costs assume.
        mlp_less_output = 3 * d_model * inner - wide * d_model
        own = rank * (d_model + 2 * inner) + d_model**2
        own += rank * (3 * wide + channels) * config.attention_adapter
        matrices = mlp_less_output + own
        return attention + Costs(
            parameters=matrices + wide + d_model,
            own_parameters=own - attention.parameters,
            forward_flops=2 * matrices * length,
            decode_flops=2 * matrices,
        )

    def reset_parameters(self) -> None:
        self.transformer.reset_parameters()

    def init_state(self, batch_size: int, max_length: int, **factory: Any) -> KVCache:
        return self.transformer.attention.init_state(batch_size, max_length, **factory)

    def backends(self, dtype: torch.dtype) -> dict[str, str]:
        return self.transformer.attention.backends(dtype)

    def forward(
        self, x_BTD: Tensor, context: Context = PLAIN, state: KVCache | None = None
    ) -> Tensor:
        attention = self.transformer.attention
        h_BTD = attention(self._attention_input(x_BTD, context), context, state)
        return self._output(h_BTD)

    def step(self, x_BD: Tensor, state: KVCache, context: Context = PLAIN) -> Tensor:
        h_BTC = self._attention_input(x_BD[:, None], context)
        h_BD = self.transformer.attention.step(h_BTC[:, 0], state, context)
        return self._output(h_BD)

    def _attention_input(self, x_BTD: Tensor, context: Context) -> Tensor:
        """Stream and embedding, normed, and after them what the adapters add to q, k and v."""
        if context.embedding_BTD is None:
            raise ValueError(f"{type(self).__name__} needs Context.embedding_BTD")
        wide_BTW = torch.cat((x_BTD, context.embedding_BTD.to(x_BTD.dtype)), dim=-1)
        wide_BTW = self.transformer.input_norm(wide_BTW)
        if not self.config.attention_adapter:
            return wide_BTW
        added = [adapter(wide_BTW) for adapter in self.attention_adapters]
        return torch.cat((wide_BTW.to(added[0].dtype), *added), dim=-1)

    def _output(self, h_D: Tensor) -> Tensor:
        h_D = self.transformer.mlp_norm(h_D.to(self.transformer.mlp_norm.weight.dtype))
        gate_F, up_F = (self.transformer.gate_up_proj(h_D) + self.mlp_adapter(h_D)).chunk(2, -1)
        h_D = self.transformer.down_proj(F.gelu(gate_F) * up_F)
        return self.linear(h_D)  # type: ignore[no-any-return]


@dataclasses.dataclass
class Zamba2State(State):
    attention: KVCache
    mamba: Mamba2State


class Zamba2(SharedAttention):
    """A Mamba-2 whose input, before its norm, gains what the shared block says."""

    Config = Zamba2Config
    glyph = "Z"
    reference = "Zamba2, arXiv:2411.15242; transformers Zamba2HybridLayer"
    output_projection = "mamba.out_proj"

    def __init__(self, d_model: int, config: Zamba2Config, **factory: Any) -> None:
        super().__init__(d_model, config, **factory)
        self.norm = nn.RMSNorm(d_model, eps=config.norm_eps, **factory)
        self.mamba = Mamba2(d_model, config.mamba(), **factory)

    @classmethod
    def check(cls, d_model: int, config: SharedAttentionConfig) -> None:
        assert isinstance(config, Zamba2Config)
        super().check(d_model, config)
        Mamba2.check(d_model, config.mamba())

    @classmethod
    def costs(
        cls,
        d_model: int,
        config: SharedAttentionConfig,
        *,
        length: int,
        bytes_per_element: int = 4,
    ) -> Costs:
        assert isinstance(config, Zamba2Config)
        at = {"length": length, "bytes_per_element": bytes_per_element}
        mamba = Mamba2.costs(d_model, config.mamba(), **at)
        return super().costs(d_model, config, **at) + mamba + Costs(parameters=d_model)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.norm.reset_parameters()
        self.mamba.reset_parameters()

    def init_state(self, batch_size: int, max_length: int, **factory: Any) -> Zamba2State:  # type: ignore[override]
        return Zamba2State(
            super().init_state(batch_size, max_length, **factory),
            self.mamba.init_state(batch_size, max_length, **factory),
        )

    def backends(self, dtype: torch.dtype) -> dict[str, str]:
        return super().backends(dtype) | self.mamba.backends(dtype)

    def forward(  # type: ignore[override]
        self, x_BTD: Tensor, context: Context = PLAIN, state: Zamba2State | None = None
    ) -> Tensor:
        said_BTD = super().forward(x_BTD, context, None if state is None else state.attention)
        mixed_BTD = self.norm((x_BTD + said_BTD).to(self.norm.weight.dtype))
        return self.mamba(mixed_BTD, context, None if state is None else state.mamba)  # type: ignore[no-any-return]

    def step(self, x_BD: Tensor, state: Zamba2State, context: Context = PLAIN) -> Tensor:  # type: ignore[override]
        said_BD = super().step(x_BD, state.attention, context)
        mixed_BD = self.norm((x_BD + said_BD).to(self.norm.weight.dtype))
        return self.mamba.step(mixed_BD, state.mamba, context)


def _adapter(inputs: int, rank: int, outputs: int, **factory: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, rank, bias=False, **factory),
        nn.Linear(rank, outputs, bias=False, **factory),
    )


def zamba2_2_7b() -> Layout:
    """45 Mamba-2 blocks and 9 hybrid ones, which take turns with two shared blocks."""
    mamba = {"d_state": 64, "headdim": 64}
    hybrid = {"num_heads": 32, "position": "none", "adapter_rank": 128, **mamba}
    hybrids = (6, 12, 18, 24, 30, 36, 42, 47, 51)
    blocks = [Block(layer="mamba2", config=mamba)] * 54
    for count, depth in enumerate(hybrids):
        blocks[depth] = Block(layer="zamba2", config={**hybrid, "group": count % 2})
    return Layout(d_model=2560, vocab_size=32000, blocks=tuple(blocks))


@hookimpl
def register_layers(register: Register[type[Layer]]) -> None:
    register("shared-attention", SharedAttention)
    register("zamba2", Zamba2)


@hookimpl
def register_presets(register: Register[Preset]) -> None:
    preset = Preset(
        layout=zamba2_2_7b,
        source="Zyphra/Zamba2-2.7B; arXiv:2411.15242",
        stated_parameters="2.7B",
        assumptions=(
            "The published configuration was not at hand: the values are the defaults of "
            "transformers' Zamba2Config, which is made after this model, with the two alternating "
            "blocks of its model card and Mamba-2 heads of 64 channels."
        ),
    )
    register("zamba2-2.7b", preset)
