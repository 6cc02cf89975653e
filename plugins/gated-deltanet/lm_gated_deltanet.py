"""Gated DeltaNet as a workbench plugin: a matrix state, decayed by a gate and written by the delta
rule, behind a short convolution.

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T       y_t = S_t^T q_t / sqrt(K)

Yang, Kautz and Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule",
arXiv:2412.06464; the chunked form is its section 3.3. Parameters are named and ordered as in
transformers' Qwen3NextGatedDeltaNet, whose state dict loads as it is; `fuse_projections` takes in
OLMo Hybrid's.

Shape suffixes: B batch, T tokens, D d_model, G key heads of K, R value heads of one key head,
H = G * R value heads of V, C convolved channels (2GK + HV), W width; S chunks of Q tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.config import Choice, Range
from workbench.costs import Costs
from workbench.errors import FieldError
from workbench.hookspecs import Register, hookimpl
from workbench.layer import PLAIN, Context, Kind, Layer, State
from workbench_mamba.common import (
    STATE_BYTES,
    at_least_float32,
    check_shared,
    init_dt_bias,
    require_at_least_one,
    upcast,
)
from workbench_mamba.norms import RMSNorm
from workbench_mamba.scan import causal_conv1d, causal_conv1d_update
from workbench_mamba.scan.common import LOG2_E, documents, without_autocast, working_dtype
from workbench_mamba.scan.state_space_block import exact_dtype

L2_EPS = 1e-6  # inside the square root of queries' and keys' norms, as in the paper's code
A_RANGE = (0.01, 16.0)  # decay rates at the start; published from 0, whose logarithm is no number


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig:
    """Hyper-parameters of Gated DeltaNet; heads need not add up to d_model."""

    num_k_heads: Annotated[int, Choice(1, 2, 4, 8, 16), "Query and key heads"] = 4
    num_v_heads: Annotated[
        int | None, Choice(None, 4, 8, 16, 32), "Value heads; null: as many as key heads"
    ] = None
    head_k_dim: Annotated[int, Choice(16, 32, 64, 96, 128), "Width of a query or key head"] = 64
    head_v_dim: Annotated[int, Choice(16, 32, 64, 128, 192), "Width of a value head"] = 64
    d_conv: Annotated[int, Range(2, 4), "Width of the causal convolution"] = 4
    allow_neg_eigval: Annotated[
        bool, Choice(False, True), "beta in [0, 2], not [0, 1]: the state may turn a key over"
    ] = False
    use_gate: Annotated[bool, Choice(True, False), "Outputs gated by silu of a projection"] = True
    chunk_size: Annotated[int, "Tokens computed as one matrix: speed only, not results"] = 64
    norm_eps: Annotated[float, "Added to the mean square in the output's RMSNorm"] = 1e-6
    dt_min: Annotated[float, "Least initial step size"] = 1e-3
    dt_max: Annotated[float, "Greatest initial step size"] = 0.1
    dt_init_floor: Annotated[float, "No initial step size is below it"] = 1e-4

    @property
    def heads(self) -> int:
        """H, the number of value heads, each with a state of its own."""
        return self.num_k_heads if self.num_v_heads is None else self.num_v_heads

    @property
    def key_dim(self) -> int:
        """GK."""
        return self.num_k_heads * self.head_k_dim

    @property
    def value_dim(self) -> int:
        """HV."""
        return self.heads * self.head_v_dim

    @property
    def conv_dim(self) -> int:
        """C: queries, keys and values."""
        return 2 * self.key_dim + self.value_dim


@dataclasses.dataclass
class GatedDeltaNetState(State):
    """The last inputs of the convolution, and S, at least in float32."""

    conv_BCW: Tensor
    delta_BHKV: Tensor


class GatedDeltaNet(Layer):
    """Projections, convolution, gated delta rule, a gated RMSNorm a head, projection.

    Padding may stand on either side of a row. A call that fills a state wants it on the left, as
    in Hugging Face's generation: after right padding the outputs at real tokens are right, but
    the convolution's window is not that of the last real token. With `seq_idx` and a state, the
    state belongs to the first document of the call. `prefix_lengths` has no effect.
    """

    Config: ClassVar[type] = GatedDeltaNetConfig
    kind: ClassVar[Kind] = "recurrent"
    glyph = "D"
    reference = "arXiv:2412.06464; transformers Qwen3NextGatedDeltaNet, OlmoHybridGatedDeltaNet"
    output_projection = "out_proj"

    def __init__(
        self,
        d_model: int,
        config: GatedDeltaNetConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, config)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        channels, gate = config.conv_dim, config.value_dim * config.use_gate
        self.in_proj_qkvz = nn.Linear(d_model, channels + gate, bias=False, **factory)
        self.in_proj_ba = nn.Linear(d_model, 2 * config.heads, bias=False, **factory)
        self.conv1d = nn.Conv1d(
            channels,
            channels,
            config.d_conv,
            padding=config.d_conv - 1,
            groups=channels,
            bias=False,
            **factory,
        )
        self.dt_bias = nn.Parameter(torch.empty(config.heads, **factory))
        self.A_log = nn.Parameter(torch.empty(config.heads, **factory))
        self.norm = RMSNorm(config.head_v_dim, eps=config.norm_eps, **factory)
        self.out_proj = nn.Linear(config.value_dim, d_model, bias=False, **factory)

    @classmethod
    def check(cls, d_model: int, config: GatedDeltaNetConfig) -> None:
        require_at_least_one(
            config, "num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim", "chunk_size"
        )
        check_shared(config)
        if config.heads % config.num_k_heads:
            works = config.num_k_heads * max(1, round(config.heads / config.num_k_heads))
            raise FieldError(
                "num_v_heads",
                f"{config.heads} is no multiple of num_k_heads = {config.num_k_heads}: {works} is",
            )

    @classmethod
    def costs(
        cls, d_model: int, config: GatedDeltaNetConfig, *, length: int, bytes_per_element: int = 4
    ) -> Costs:
        heads, k, v = config.heads, config.head_k_dim, config.head_v_dim
        channels, width = config.conv_dim, config.d_conv
        linears = d_model * (channels + config.value_dim * config.use_gate + 2 * heads)
        linears += d_model * config.value_dim
        token = 2 * linears + 2 * width * channels
        q = min(config.chunk_size, length)
        # Of a key head: keys and queries with keys. Of a value head: the triangular system, the
        # state read by keys and queries and written, and the sum over the chunk's tokens.
        chunk = config.num_k_heads * 4 * q * q * k
        chunk += heads * (q * (q - 1) * (k + v) + 6 * q * k * v + 2 * q * q * v)
        state_bytes = channels * width * bytes_per_element
        state_bytes += heads * k * v * max(bytes_per_element, STATE_BYTES)
        return Costs(
            parameters=linears + width * channels + 2 * heads + v,
            forward_flops=token * length + chunk * -(-length // q),
            decode_flops=token + 7 * heads * k * v,
            state_bytes=state_bytes,
            decode_state_bytes=2 * state_bytes,
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Decay rates are uniform, step sizes log-uniform, as published."""
        self.conv1d.reset_parameters()
        init_dt_bias(self.dt_bias, self.config)
        rates = torch.empty_like(self.A_log, dtype=torch.float32).uniform_(*A_RANGE)
        self.A_log.copy_(rates.log_())
        self.norm.reset_parameters()

    def init_state(
        self,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> GatedDeltaNetState:
        """Zeros; its size does not depend on `max_length`."""
        weight, config = self.conv1d.weight, self.config
        device = weight.device if device is None else device
        dtype = dtype or weight.dtype
        delta = (batch_size, config.heads, config.head_k_dim, config.head_v_dim)
        return GatedDeltaNetState(
            torch.zeros(batch_size, len(weight), config.d_conv, device=device, dtype=dtype),
            torch.zeros(delta, device=device, dtype=at_least_float32(dtype)),
        )

    def forward(
        self, x_BTD: Tensor, context: Context = PLAIN, state: GatedDeltaNetState | None = None
    ) -> Tensor:
        qkv_BTC, z_BTHV, beta_BTH, g_BTH = self._project(x_BTD)
        qkv_BTC, conv_BCW = causal_conv1d(
            context.mask_padding(qkv_BTC),
            self.conv1d.weight.squeeze(1),
            initial_state_BCW=None if state is None else state.conv_BCW,
            seq_idx_BL=context.seq_idx_BT,
        )
        q_BTGK, k_BTGK, v_BTHV = self._split(qkv_BTC)
        with without_autocast(x_BTD):
            y_BTHV, delta_BHKV = gated_delta_rule(
                q_BTGK,
                k_BTGK,
                v_BTHV,
                context.mask_padding(g_BTH),  # no decay and no write: the state stays as it is
                context.mask_padding(beta_BTH),
                None if state is None else state.delta_BHKV,
                chunk_size=self.config.chunk_size,
                seq_idx_BT=context.seq_idx_BT,
            )
        if state is not None:
            state.conv_BCW.copy_(conv_BCW.detach())
            state.delta_BHKV.copy_(delta_BHKV.detach())
        return self._output(y_BTHV, z_BTHV, x_BTD.dtype)

    def step(self, x_BD: Tensor, state: GatedDeltaNetState, context: Context = PLAIN) -> Tensor:
        qkv_BC, z_BHV, beta_BH, g_BH = self._project(x_BD)
        weight_CW = self.conv1d.weight.squeeze(1)
        qkv_BC = causal_conv1d_update(state.conv_BCW, qkv_BC, weight_CW, None, "silu")
        with without_autocast(x_BD):
            y_BHV = gated_delta_step(state.delta_BHKV, *self._split(qkv_BC), g_BH, beta_BH)
        return self._output(y_BHV, z_BHV, x_BD.dtype)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Convolution's input `[..., C]`, gate `[..., H, V]`, beta and g `[..., H]` in float32."""
        config = self.config
        groups = config.num_k_heads
        wide = config.value_dim // groups
        qkvz = torch.unflatten(self.in_proj_qkvz(x), -1, (groups, -1))
        widths = [config.head_k_dim, config.head_k_dim, wide, wide * config.use_gate]
        q, k, v, z = (part.flatten(-2) for part in torch.split(qkvz, widths, -1))
        ba = torch.unflatten(self.in_proj_ba(x), -1, (groups, -1))
        b, a = (upcast(part.flatten(-2)) for part in ba.chunk(2, -1))
        beta = b.sigmoid() * (2 if config.allow_neg_eigval else 1)
        g = -upcast(self.A_log).exp() * F.softplus(a + upcast(self.dt_bias))
        gate = torch.unflatten(z, -1, (config.heads, -1)) if config.use_gate else None
        return torch.cat((q, k, v), -1), gate, beta, g

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit queries and keys `[..., G, K]` and values `[..., H, V]`, in float32."""
        config = self.config
        q, k, v = torch.split(upcast(qkv), [config.key_dim, config.key_dim, config.value_dim], -1)
        q, k = (_unit(torch.unflatten(part, -1, (config.num_k_heads, -1))) for part in (q, k))
        return q * config.head_k_dim**-0.5, k, torch.unflatten(v, -1, (config.heads, -1))

    def _output(self, y: Tensor, z: Tensor | None, dtype: torch.dtype) -> Tensor:
        y = self.norm(y) if z is None else self.norm(y) * F.silu(upcast(z))
        return self.out_proj(y.flatten(-2).to(dtype))  # type: ignore[no-any-return]


def fuse_projections(
    separate: Mapping[str, Tensor], config: GatedDeltaNetConfig
) -> dict[str, Tensor]:
    """The layer's state dict from one that keeps every projection apart (OlmoHybridGatedDeltaNet).

    The same numbers in another order: each key head's q, k, v and gate rows, its b and a rows.
    """
    renamed = {"norm.weight": "o_norm.weight", "out_proj.weight": "o_proj.weight"}
    fused = {new: separate[old] for new, old in renamed.items()}
    fused |= {name: separate[name] for name in ("conv1d.weight", "dt_bias", "A_log")}
    for name, parts in (("in_proj_qkvz", "qkvg"), ("in_proj_ba", "ba")):
        weights = [separate[f"{part}_proj.weight"] for part in parts]
        by_head = [torch.unflatten(weight, 0, (config.num_k_heads, -1)) for weight in weights]
        fused[f"{name}.weight"] = torch.cat(by_head, 1).flatten(0, 1)
    return fused


def gated_delta_rule(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    start_BHKV: Tensor | None = None,
    *,
    chunk_size: int = 64,
    seq_idx_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence over whole sequences, a chunk of tokens at a time.

    Within a chunk every token writes what its key does not yet hold, which depends on the writes
    before it: one triangular system gives them all (the WY form), as a part that knows no earlier
    chunk and a part linear in the chunk's first state. Only states go from chunk to chunk.

    Args:
        q_BTGK, k_BTGK: unit queries, scaled, and unit keys; value head h uses `h // R`.
        g_BTH: logarithm of the decay, at most 0.
        beta_BTH: how much of a key's old value is replaced.
        start_BHKV: the state before the first token (zero if None). With `seq_idx` it belongs to
            the first document only.
        chunk_size: changes speed and memory, not results.
        seq_idx_BT: integers; the state starts from zero wherever they change along a row.

    Returns:
        Outputs `[B, T, H, V]` and the last state `[B, H, K, V]`, in float32 (float64 for float64).
    """
    length, groups, dtype = q_BTGK.shape[1], q_BTGK.shape[2], working_dtype(q_BTGK)
    size = min(chunk_size, length)
    parts = q_BTGK, k_BTGK, v_BTHV, g_BTH.unsqueeze(-1), beta_BTH.unsqueeze(-1)
    # Of each [S, B, G, R, Q, width]; for queries and keys R is 1, for g and beta the width.
    q, k, v, g, beta = (_chunked(part.to(dtype), size, groups) for part in parts)
    decay, from_start, to_end, through = _decays(g.squeeze(-1), seq_idx_BT, size)
    system = k @ k.mT * decay * beta
    wanted = torch.cat((v * beta, k * (beta * from_start)), -1)
    solved = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    fresh, read = solved.split((v.shape[-1], k.shape[-1]), -1)
    kept = (k * to_end).mT
    state = fresh.new_zeros(*fresh.shape[1:4], k.shape[-1], v.shape[-1])
    if start_BHKV is not None:
        state = torch.unflatten(start_BHKV.to(dtype), 1, state.shape[1:3])
    states, written = [], []
    for s in range(len(q)):
        states.append(state)
        written.append(fresh[s] - read[s] @ state)
        state = through[s] * state + kept[s] @ written[s]
    y = (q * from_start) @ torch.stack(states) + (q @ k.mT * decay) @ torch.stack(written)
    y_BTHV = y.permute(1, 0, 4, 2, 3, 5).flatten(1, 2).flatten(2, 3)
    return y_BTHV[:, :length], state.flatten(1, 2)


def gated_delta_step(
    state_BHKV: Tensor, q_BGK: Tensor, k_BGK: Tensor, v_BHV: Tensor, g_BH: Tensor, beta_BH: Tensor
) -> Tensor:
    """One token of `gated_delta_rule`: overwrite the state and return `y_BHV` in v's dtype."""
    dtype, repeats = working_dtype(v_BHV), v_BHV.shape[1] // k_BGK.shape[1]
    q_BHK1, k_BHK1 = (
        part.to(dtype).repeat_interleave(repeats, 1).unsqueeze(-1) for part in (q_BGK, k_BGK)
    )
    decayed_BHKV = state_BHKV.to(dtype) * g_BH.to(dtype).exp()[..., None, None]
    change_BH1V = v_BHV.to(dtype).unsqueeze(-2) - k_BHK1.mT @ decayed_BHKV
    new_BHKV = decayed_BHKV + k_BHK1 * (change_BH1V * beta_BH.to(dtype)[..., None, None])
    state_BHKV.copy_(new_BHKV.detach())
    return (q_BHK1.mT @ new_BHKV).squeeze(-2).to(v_BHV.dtype)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def _chunked(x_BTHN: Tensor, size: int, groups: int) -> Tensor:
    """`[S, B, G, R, Q, N]`; zeros at the end, which neither decay nor write."""
    x_BTHN = F.pad(x_BTHN, (0, 0, 0, 0, 0, -x_BTHN.shape[1] % size))
    x_BTGRN = torch.unflatten(x_BTHN, 2, (groups, -1))
    return torch.unflatten(x_BTGRN, 1, (-1, size)).permute(1, 0, 3, 4, 2, 5).contiguous()


def _decays(
    g_SBGRQ: Tensor, seq_idx_BT: Tensor | None, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decays from token to token `[..., Q, Q]`, from the chunk's start to each token and from each
    to its end `[..., Q, 1]`, and through the chunk `[..., 1, 1]`; zero across borders.

    Exponents are differences of sums, which therefore run in float64; powers of two, because on
    a CPU exp takes many times as long for results that underflow.
    """
    dtype = g_SBGRQ.dtype
    total = (g_SBGRQ.to(exact_dtype(g_SBGRQ)) * LOG2_E).cumsum(-1)
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).to(dtype)
    from_start, last = total.to(dtype).unsqueeze(-1), total[..., -1:]
    to_end = (last - total).to(dtype).unsqueeze(-1)
    through = last.to(dtype).unsqueeze(-1)
    barred = torch.ones(size, size, dtype=torch.bool, device=total.device).triu(1)
    if seq_idx_BT is not None:
        document_BT = documents(seq_idx_BT)
        missing = -document_BT.shape[1] % size
        document_BT = torch.cat((document_BT, document_BT[:, -1:].expand(-1, missing)), 1)
        document = torch.unflatten(document_BT, 1, (-1, size)).transpose(0, 1)[:, :, None, None]
        final = document[..., -1:]
        # The state that enters a chunk belongs to the last document of the chunk before.
        before = torch.cat((torch.zeros_like(final[:1]), final[:-1]))
        barred = barred | (document.unsqueeze(-1) != document.unsqueeze(-2))
        from_start = from_start.masked_fill((document != before).unsqueeze(-1), -torch.inf)
        to_end = to_end.masked_fill((document != final).unsqueeze(-1), -torch.inf)
        through = through.masked_fill((before != final).unsqueeze(-1), -torch.inf)
    # Barred before exp2: above the diagonal exponents are positive and could overflow.
    between = between.masked_fill(barred, -torch.inf)
    return between.exp2(), from_start.exp2(), to_end.exp2(), through.exp2()


@hookimpl
def register_layers(register: Register[type[Layer]]) -> None:
    register("gated-deltanet", GatedDeltaNet)
