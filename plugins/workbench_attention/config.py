"""What an attention layer may be set to, how its heads divide, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from workbench.config import Choice, Range
from workbench.errors import FieldError

DEFAULT_HEAD_DIM = 64  # where neither head_dim nor num_heads is given


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Shape and positions of an attention layer."""

    num_heads: Annotated[int | None, Choice(2, 4, 8, 16), "Query heads; null: d_model/head_dim"] = (
        None
    )
    num_kv_heads: Annotated[
        int | None, Choice(1, 2, 4), "Key-value heads (1: MQA); null: num_heads"
    ] = None
    head_dim: Annotated[
        int | None, Choice(32, 64, 128), "Channels a head; null: d_model/num_heads, or 64"
    ] = None
    position: Annotated[
        Literal["rope", "none", "alibi"], Choice("rope", "none", "alibi"), "Position encoding"
    ] = "rope"
    rope_theta: Annotated[float, Range(1e4, 1e6, log=True), "Base of RoPE's frequencies"] = 10000.0
    partial_rotary_factor: Annotated[
        float, Choice(0.25, 0.5, 1.0), "Share of a head's channels that RoPE turns"
    ] = 1.0
    sliding_window: Annotated[
        int | None, Choice(None, 64, 128, 256, 512), "Tokens seen, itself included; null: all"
    ] = None
    qk_norm: Annotated[bool, Choice(False, True), "RMSNorm over each head's query and key"] = False
    norm_eps: Annotated[float, "Added to the mean square in qk_norm"] = 1e-6
    bias: Annotated[bool, "Biases on q, k and v"] = False
    out_bias: Annotated[bool, "Bias on the output projection"] = False
    scale: Annotated[float | None, "Factor on the scores; null: head_dim ** -0.5"] = None


@dataclass(frozen=True)
class Heads:
    """How the channels divide: query heads H, key-value heads K, channels a head P."""

    queries: int
    kv: int
    dim: int

    @classmethod
    def of(cls, d_model: int, config: AttentionConfig) -> Heads:
        """The Config's heads with every None worked out.

        Raises:
            FieldError: they do not divide.
        """
        queries, dim = config.num_heads, config.head_dim
        for name, value in (
            ("num_heads", queries), ("head_dim", dim), ("num_kv_heads", config.num_kv_heads)
        ):  # fmt: skip
            if value is not None and value < 1:
                raise FieldError(name, f"must be at least 1, got {value}")
        if queries is None:
            dim = DEFAULT_HEAD_DIM if dim is None else dim
            queries = _quotient("head_dim", d_model, dim, "num_heads")
        elif dim is None:
            dim = _quotient("num_heads", d_model, queries, "head_dim")
        kv = queries if config.num_kv_heads is None else config.num_kv_heads
        if queries % kv:
            fitting = [str(n) for n in range(1, queries + 1) if queries % n == 0]
            raise FieldError(
                "num_kv_heads",
                f"{kv} does not divide the {queries} query heads: use one of {', '.join(fitting)}",
            )
        return cls(queries, kv, dim)

    def rotary(self, config: AttentionConfig) -> int:
        """How many of a head's channels RoPE turns."""
        return int(self.dim * config.partial_rotary_factor)


def check(d_model: int, config: AttentionConfig) -> None:
    """Refuse a Config that cannot be built.

    Raises:
        FieldError: names the field and what would work.
    """
    heads = Heads.of(d_model, config)
    if config.sliding_window is not None and config.sliding_window < 1:
        raise FieldError(
            "sliding_window", f"must be at least 1, or null, got {config.sliding_window}"
        )
    if config.norm_eps <= 0:
        raise FieldError("norm_eps", f"must be above 0, got {config.norm_eps}")
    if config.position == "rope":
        _check_rope(heads, config)


def _quotient(field: str, d_model: int, divisor: int, other: str) -> int:
    if d_model % divisor:
        nearest = max(n for n in range(1, min(divisor, d_model) + 1) if d_model % n == 0)
        raise FieldError(
            field,
            f"{divisor} does not divide d_model = {d_model}: use {nearest}, or set {other} as well",
        )
    return d_model // divisor


def _check_rope(heads: Heads, config: AttentionConfig) -> None:
    if config.rope_theta <= 0:
        raise FieldError("rope_theta", f"must be above 0, got {config.rope_theta}")
    if not 0 < config.partial_rotary_factor <= 1:
        raise FieldError(
            "partial_rotary_factor",
            f"must be above 0 and at most 1, got {config.partial_rotary_factor}; "
            'for no rotation set position = "none"',
        )
    channels = heads.rotary(config)
    if channels % 2 or channels == 0:
        field = "head_dim" if config.partial_rotary_factor == 1 else "partial_rotary_factor"
        raise FieldError(
            field,
            f"RoPE turns pairs of channels, and {heads.dim} x {config.partial_rotary_factor} gives "
            f"{channels}: make it even and above 0",
        )
