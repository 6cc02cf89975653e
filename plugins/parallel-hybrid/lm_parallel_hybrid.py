"""Attention beside Mamba-2 in one block, on the same input, their outputs summed.

    y = W [a_out attention(a_in x), s_out mamba2(s_in x)]        W = [W_attention, W_ssm]

Zuo et al., "Falcon-H1: A Family of Hybrid-Head Language Models Redefining Efficiency and
Performance", arXiv:2507.22448, with its multipliers; transformers' FalconH1DecoderLayer computes
the same. Normed heads on both sides are those of Hymba, arXiv:2411.13676. The branches are the
workbench's own attention and Mamba-2; the two projections to the residual stream are the halves of
one linear, so that it can be initialised, quantized and multiplied with as one.

Shape suffixes: B batch, T tokens, D d_model, W channels of the attention heads, I channels of the
SSM heads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.config import Choice, Range
from workbench.costs import Costs
from workbench.errors import FieldError
from workbench.hookspecs import Register, hookimpl
from workbench.layer import PLAIN, Context, Kind, Layer, State
from workbench_attention.attention import Attention
from workbench_attention.cache import KVCache
from workbench_attention.config import AttentionConfig
from workbench_mamba.common import require_at_least_one, upcast
from workbench_mamba.mamba2 import Mamba2, Mamba2Config, Mamba2State
from workbench_mamba.norms import RMSNorm
from workbench_mlp.swiglu import SwiGLU, SwiGLUConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelHybridConfig:
    """Shapes of both branches, and how one budget of parameters is split between them.

    `attention_share` moves heads from one branch to the other at constant size: attention takes
    the number of key-value heads nearest to its share (at least one, and leaving room for one SSM
    head a group), the SSM the number of heads that brings the layer nearest to
    `budget * d_model ** 2` parameters. The rest, at most half of what `n_groups` SSM heads take,
    is rounding. Explicit numbers of heads override budget and share.
    """

    attention_share: Annotated[
        float, Range(0.1, 0.9), "Share of the budget that attention's heads take"
    ] = 0.25
    budget: Annotated[
        float, Range(2.0, 8.0), "Parameters of both branches together over d_model ** 2"
    ] = 6.0
    queries_per_kv: Annotated[int, Choice(1, 2, 4), "Query heads a key-value head"] = 2
    num_kv_heads: Annotated[int | None, "Key-value heads; null: by attention_share"] = None
    head_dim: Annotated[int, Choice(32, 64, 128), "Channels of an attention head"] = 64
    position: Annotated[
        Literal["rope", "none", "alibi"], Choice("rope", "none"), "Position encoding of attention"
    ] = "rope"
    rope_theta: Annotated[float, Range(1e4, 1e6, log=True), "Base of RoPE's frequencies"] = 10000.0
    sliding_window: Annotated[
        int | None, Choice(None, 64, 128, 256, 512), "Tokens attention sees; null: all"
    ] = None
    num_ssm_heads: Annotated[int | None, "SSM heads; null: what the budget leaves"] = None
    headdim: Annotated[int, Choice(32, 64, 128), "Channels of an SSM head"] = 64
    d_state: Annotated[int, Choice(16, 32, 64, 128, 256), "State size N of each channel"] = 128
    n_groups: Annotated[int, Choice(1, 2, 4), "Groups of SSM heads that share B and C"] = 1
    d_conv: Annotated[int, Range(2, 4), "Width of the SSM's causal convolution"] = 4
    chunk_size: Annotated[int, "Tokens computed as one matrix: speed only, not results"] = 64
    attention_norm: Annotated[
        bool, Choice(False, True), "RMSNorm over each attention head's output"
    ] = False
    ssm_norm: Annotated[bool, Choice(False, True), "RMSNorm after the SSM's gate"] = True
    norm_eps: Annotated[float, "Added to the mean square in both norms"] = 1e-5
    attention_in_multiplier: Annotated[float, "On attention's input"] = 1.0
    attention_out_multiplier: Annotated[float, "On attention's output"] = 1.0
    key_multiplier: Annotated[float, "On the keys, which is to say on the scores"] = 1.0
    ssm_in_multiplier: Annotated[float, "On the SSM's input"] = 1.0
    ssm_out_multiplier: Annotated[float, "On the SSM's output"] = 1.0
    ssm_multipliers: Annotated[
        tuple[float, float, float, float, float], "On the SSM's gate z, x, B, C and dt"
    ] = (1.0, 1.0, 1.0, 1.0, 1.0)

    def attention(self, num_kv_heads: int) -> AttentionConfig:
        """The attention branch with so many key-value heads."""
        return AttentionConfig(
            num_heads=num_kv_heads * self.queries_per_kv,
            num_kv_heads=num_kv_heads,
            head_dim=self.head_dim,
            position=self.position,
            rope_theta=self.rope_theta,
            sliding_window=self.sliding_window,
            scale=self.key_multiplier * self.head_dim**-0.5,
        )

    def ssm(self, num_heads: int) -> Mamba2Config:
        """The SSM branch with so many heads."""
        return Mamba2Config(
            d_state=self.d_state,
            d_conv=self.d_conv,
            headdim=self.headdim,
            num_heads=num_heads,
            n_groups=self.n_groups,
            chunk_size=self.chunk_size,
            norm_eps=self.norm_eps,
        )


@dataclasses.dataclass(frozen=True)
class Split:
    """How many heads each branch has."""

    kv_heads: int
    ssm_heads: int

    @classmethod
    def of(cls, d_model: int, config: ParallelHybridConfig) -> Split:
        """The Config's heads with every None worked out.

        Raises:
            FieldError: the budget is too small for one head of each kind.
        """
        budget, step = config.budget * d_model**2, config.n_groups
        # A branch is a constant and so much a head, whatever its options are.
        first_kv = _attention_parameters(d_model, config, 1)
        kv_unit = _attention_parameters(d_model, config, 2) - first_kv
        first_ssm = _ssm_parameters(d_model, config, step)
        ssm_unit = _ssm_parameters(d_model, config, 2 * step) - first_ssm
        kv_heads, ssm_heads = config.num_kv_heads, config.num_ssm_heads
        if kv_heads is None:
            most = 1 + math.floor((budget + ssm_unit / 2 - first_kv - first_ssm) / kv_unit)
            wanted = round(config.attention_share * budget / kv_unit)
            kv_heads = max(1, min(wanted, most))
        if ssm_heads is None:
            left = budget - _attention_parameters(d_model, config, kv_heads)
            units = 1 + round((left - first_ssm) / ssm_unit)
            if units < 1:
                least = (budget - left + first_ssm) / d_model**2
                raise FieldError(
                    "budget",
                    f"{config.budget} is too small at d_model = {d_model} for {kv_heads} key-value "
                    f"and {step} SSM heads: use {math.ceil(100 * least) / 100} or more, or smaller "
                    "heads",
                )
            ssm_heads = step * units
        return cls(kv_heads, ssm_heads)


def _attention_parameters(d_model: int, config: ParallelHybridConfig, kv_heads: int) -> int:
    counted = Attention.costs(d_model, config.attention(kv_heads), length=1).parameters
    width = kv_heads * config.queries_per_kv * config.head_dim
    return counted + width * config.attention_norm


def _ssm_parameters(d_model: int, config: ParallelHybridConfig, heads: int) -> int:
    counted = Mamba2.costs(d_model, config.ssm(heads), length=1).parameters
    return counted - heads * config.headdim * (not config.ssm_norm)


class Gate(nn.Module):
    """`y * silu(z)`: what stands where Mamba-2 has its gated norm, if it has none."""

    def reset_parameters(self) -> None:
        """Nothing to reset."""

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """`[..., I]`, computed at least in float32."""
        return (upcast(y) * F.silu(upcast(z))).to(y.dtype)


class ScaledLinear(nn.Module):
    """A linear whose output's segments are multiplied, each by a constant of its own.

    Args:
        linear: stays a plain linear, so that quantizers find it.
        widths: of the segments, together its out_features.
        multipliers: one a segment.
    """

    def __init__(
        self, linear: nn.Linear, widths: Sequence[int], multipliers: Sequence[float]
    ) -> None:
        super().__init__()
        self.linear = linear
        self.segments = tuple(zip(widths, multipliers, strict=True))
        self.out_features = linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        scale = torch.cat([y.new_full((width,), value) for width, value in self.segments])
        return y * scale  # type: ignore[no-any-return]


@dataclasses.dataclass
class ParallelHybridState(State):
    """The states of both branches."""

    attention: KVCache
    ssm: Mamba2State


class ParallelHybrid(Layer):
    """Attention and Mamba-2 side by side; see `ParallelHybridConfig`.

    It publishes what its attention publishes. A bidirectional prefix concerns attention alone.
    """

    Config: ClassVar[type] = ParallelHybridConfig
    kind: ClassVar[Kind] = "attention"
    glyph = "H"
    reference = (
        "Falcon-H1, arXiv:2507.22448; normed heads: Hymba, arXiv:2411.13676; "
        "transformers FalconH1DecoderLayer"
    )
    keep_precision: ClassVar[Mapping[str, str]] = {
        f"{branch}.{name}": why
        for branch, layer in (("attention", Attention), ("ssm", Mamba2))
        for name, why in layer.keep_precision.items()
    }
    output_projection = "out_proj"

    def __init__(
        self,
        d_model: int,
        config: ParallelHybridConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, config)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        split = Split.of(d_model, config)
        self.attention = Attention(d_model, config.attention(split.kv_heads), **factory)
        self.ssm = Mamba2(d_model, config.ssm(split.ssm_heads), **factory)
        width, inner = self.attention.o_proj.in_features, self.ssm.inner
        # The branches give their heads' channels: out_proj takes both.
        self.attention.set_submodule("o_proj", nn.Identity())
        self.ssm.set_submodule("out_proj", nn.Identity())
        if config.attention_norm:
            heads = split.kv_heads * config.queries_per_kv
            self.attention_norm = RMSNorm(width, groups=heads, eps=config.norm_eps, **factory)
        if not config.ssm_norm:
            self.ssm.set_submodule("norm", Gate())
        if any(multiplier != 1.0 for multiplier in config.ssm_multipliers):
            shared = config.n_groups * config.d_state
            widths = (inner, inner, shared, shared, split.ssm_heads)
            scaled = ScaledLinear(self.ssm.in_proj, widths, config.ssm_multipliers)
            self.ssm.set_submodule("in_proj", scaled)
        self.out_proj = nn.Linear(width + inner, d_model, bias=False, **factory)

    @classmethod
    def check(cls, d_model: int, config: ParallelHybridConfig) -> None:
        require_at_least_one(
            config,
            *("queries_per_kv", "num_kv_heads", "head_dim", "num_ssm_heads", "headdim"),
            *("d_state", "n_groups", "chunk_size"),
        )
        if not 0 < config.attention_share < 1:
            raise FieldError(
                "attention_share",
                f"must be above 0 and below 1, got {config.attention_share}; for one branch alone "
                "use the layer attention or mamba2",
            )
        if config.budget <= 0:
            raise FieldError("budget", f"must be above 0, got {config.budget}")
        split = Split.of(d_model, config)
        Attention.check(d_model, config.attention(split.kv_heads))
        Mamba2.check(d_model, config.ssm(split.ssm_heads))

    @classmethod
    def costs(
        cls,
        d_model: int,
        config: ParallelHybridConfig,
        *,
        length: int,
        bytes_per_element: int = 4,
    ) -> Costs:
        split = Split.of(d_model, config)
        size: dict[str, int] = {"length": length, "bytes_per_element": bytes_per_element}
        both = Attention.costs(d_model, config.attention(split.kv_heads), **size)
        both += Mamba2.costs(d_model, config.ssm(split.ssm_heads), **size)
        parameters = _attention_parameters(d_model, config, split.kv_heads)
        parameters += _ssm_parameters(d_model, config, split.ssm_heads)
        return both + Costs(parameters=parameters - both.parameters)  # norms

    def reset_parameters(self) -> None:
        self.attention.reset_parameters()
        self.ssm.reset_parameters()
        if self.config.attention_norm:
            self.attention_norm.reset_parameters()

    def init_state(
        self,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ParallelHybridState:
        """An empty cache of `max_length` tokens beside a zero recurrent state."""
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        return ParallelHybridState(
            self.attention.init_state(batch_size, max_length, **factory),
            self.ssm.init_state(batch_size, max_length, **factory),
        )

    def backends(self, dtype: torch.dtype) -> dict[str, str]:
        return self.attention.backends(dtype) | self.ssm.backends(dtype)

    def forward(
        self, x_BTD: Tensor, context: Context = PLAIN, state: ParallelHybridState | None = None
    ) -> Tensor:
        x_attention_BTD, x_ssm_BTD = self._inputs(x_BTD)
        y_BTW = self.attention(x_attention_BTD, context, None if state is None else state.attention)
        y_BTI = self.ssm(x_ssm_BTD, context, None if state is None else state.ssm)
        return self._output(y_BTW, y_BTI)

    def step(self, x_BD: Tensor, state: ParallelHybridState, context: Context = PLAIN) -> Tensor:
        x_attention_BD, x_ssm_BD = self._inputs(x_BD)
        y_BW = self.attention.step(x_attention_BD, state.attention, context)
        y_BI = self.ssm.step(x_ssm_BD, state.ssm, context)
        return self._output(y_BW, y_BI)

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What attention and the SSM take in, `[..., D]`."""
        config = self.config
        return _times(x, config.attention_in_multiplier), _times(x, config.ssm_in_multiplier)

    def _output(self, y_attention: Tensor, y_ssm: Tensor) -> Tensor:
        """`[..., D]` of the heads' channels `[..., W]` and `[..., I]`."""
        if self.config.attention_norm:
            y_attention = self.attention_norm(y_attention)
        y_attention = _times(y_attention, self.config.attention_out_multiplier)
        y_ssm = _times(y_ssm, self.config.ssm_out_multiplier)
        return self.out_proj(torch.cat((y_attention, y_ssm), -1))  # type: ignore[no-any-return]


def _times(x: Tensor, multiplier: float) -> Tensor:
    return x if multiplier == 1.0 else x * multiplier


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledSwiGLUConfig(SwiGLUConfig):
    """A SwiGLU's, and two constants."""

    gate_multiplier: Annotated[float, "On the gate before its SiLU"] = 1.0
    down_multiplier: Annotated[float, "On the output"] = 1.0


class ScaledSwiGLU(SwiGLU):
    """`down_multiplier * down_proj(silu(gate_multiplier * gate_proj(x)) * up_proj(x))`."""

    Config = ScaledSwiGLUConfig
    glyph = "="
    reference = "Falcon-H1, arXiv:2507.22448; transformers FalconH1MLP"

    def forward(
        self, x_BTD: Tensor, context: Context = PLAIN, state: State | None = None
    ) -> Tensor:
        gate = _times(self.gate_proj(x_BTD), self.config.gate_multiplier)
        inner = F.silu(gate) * self.up_proj(x_BTD)
        return _times(self.down_proj(inner), self.config.down_multiplier)


@hookimpl
def register_layers(register: Register[type[Layer]]) -> None:
    register("parallel-hybrid", ParallelHybrid)
    register("scaled-swiglu", ScaledSwiGLU)
