"""Mamba-2: the state space dual layer, one decay a head, computed as matrix products.

Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured
State Space Duality", arXiv:2405.21060. Parameters are named and ordered as published (in_proj
gives z, x, B, C, dt), so a reference's state dict loads as it is.

Shape suffixes: B batch, T tokens, D d_model, I inner channels (H heads of P), G groups, N state,
C convolved channels (I + 2GN), W width.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.config import Choice, Range
from workbench.costs import Costs
from workbench.errors import FieldError
from workbench.layer import PLAIN, Context, Kind, Layer, State
from workbench_mamba.common import (
    STATE_BYTES,
    at_least_float32,
    check_shared,
    divisors,
    init_dt_bias,
    is_plain,
    nearest,
    require_at_least_one,
    upcast,
)
from workbench_mamba.kernels import (
    causal_conv1d,
    conv_backend,
    ssd,
    ssd_backend,
)
from workbench_mamba.norms import RMSNorm
from workbench_mamba.scan import causal_conv1d_update, last_inputs, ssd_state_update


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """Hyper-parameters of Mamba-2, under their published names."""

    d_state: Annotated[int, Choice(16, 32, 64, 128, 256), "State size N of each channel"] = 128
    d_conv: Annotated[int, Range(2, 4), "Width of the causal convolution"] = 4
    expand: Annotated[int, Choice(1, 2, 3, 4), "Inner channels as a multiple of d_model"] = 2
    headdim: Annotated[int, Choice(32, 64, 128), "Channels P of a head"] = 64
    num_heads: Annotated[int | None, "Heads; null: expand * d_model / headdim"] = None
    n_groups: Annotated[int, Choice(1, 2, 4, 8), "Groups of heads that share B and C"] = 1
    chunk_size: Annotated[int, "Tokens computed as one matrix: speed only, not results"] = 64
    conv_bias: Annotated[bool, "Bias in the convolution"] = True
    bias: Annotated[bool, "Bias in in_proj and out_proj"] = False
    grouped_norm: Annotated[bool, "Gated RMSNorm over each group's channels, not over all"] = True
    norm_eps: Annotated[float, "Added to the mean square in the gated RMSNorm"] = 1e-5
    dt_min: Annotated[float, "Least initial step size"] = 1e-3
    dt_max: Annotated[float, "Greatest initial step size"] = 0.1
    dt_init_floor: Annotated[float, "No initial step size is below it"] = 1e-4
    dt_limit_min: Annotated[float, "Step sizes are clamped to at least this"] = 0.0
    dt_limit_max: Annotated[float | None, "Step sizes are clamped to at most this"] = None

    def heads(self, d_model: int) -> int:
        """H: `num_heads`, or as many as make `expand * d_model` channels."""
        return self.expand * d_model // self.headdim if self.num_heads is None else self.num_heads

    def d_inner(self, d_model: int) -> int:
        """Number of inner channels I."""
        return self.heads(d_model) * self.headdim


@dataclasses.dataclass
class Mamba2State(State):
    """The last inputs of the convolution, and the recurrence's state (`Mamba2.state_dtype`)."""

    conv_BCW: Tensor
    ssm_BHPN: Tensor


class Mamba2(Layer):
    """Convolution and state space dual scan between two projections, with a gated RMSNorm.

    Padding may stand on either side of a row. A call that fills a state wants it on the left, as
    in Hugging Face's generation: after right padding the outputs at real tokens are right, but
    the convolution's window is not that of the last real token. With `seq_idx` and a state, the
    state belongs to the first document of the call. `prefix_lengths` has no effect: the
    recurrence stays causal.

    Attributes:
        state_dtype: what `init_state` keeps the recurrence's state in; None for the activations'
            dtype, but float32 at least. Half as wide, a state takes half the time to read and is
            rounded at every token (`workbench.decoding.set_state_dtype`); steps are computed in
            float32 all the same.
    """

    Config: ClassVar[type] = Mamba2Config
    kind: ClassVar[Kind] = "recurrent"
    glyph = "2"
    reference = "arXiv:2405.21060"
    output_projection = "out_proj"
    state_dtype: torch.dtype | None = None

    def __init__(
        self,
        d_model: int,
        config: Mamba2Config,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, config)
        self.inner, self.heads = config.d_inner(d_model), config.heads(d_model)
        self.group_channels = config.n_groups * config.d_state
        channels = self.inner + 2 * self.group_channels
        rows = self.inner + channels + self.heads
        self.in_proj = nn.Linear(d_model, rows, config.bias, device, dtype)
        self.conv1d = nn.Conv1d(
            channels,
            channels,
            config.d_conv,
            padding=config.d_conv - 1,
            groups=channels,
            bias=config.conv_bias,
            device=device,
            dtype=dtype,
        )
        self.dt_bias = nn.Parameter(torch.empty(self.heads, device=device, dtype=dtype))
        self.A_log = nn.Parameter(torch.empty(self.heads, device=device, dtype=dtype))
        self.D = nn.Parameter(torch.empty(self.heads, device=device, dtype=dtype))
        self.norm = RMSNorm(
            self.inner,
            groups=config.n_groups if config.grouped_norm else 1,
            eps=config.norm_eps,
            device=device,
            dtype=dtype,
        )
        self.out_proj = nn.Linear(self.inner, d_model, config.bias, device, dtype)

    @classmethod
    def check(cls, d_model: int, config: Mamba2Config) -> None:
        require_at_least_one(
            config, "d_state", "expand", "headdim", "num_heads", "n_groups", "chunk_size"
        )
        check_shared(config)
        channels = config.expand * d_model
        if config.num_heads is None and channels % config.headdim:
            works = nearest(divisors(channels), config.headdim)
            raise FieldError(
                "headdim",
                f"{config.headdim} does not divide expand * d_model = {channels}: "
                f"{works} does; or set num_heads",
            )
        heads = config.heads(d_model)
        if heads % config.n_groups:
            works = nearest(divisors(heads), config.n_groups)
            raise FieldError(
                "n_groups", f"{config.n_groups} does not divide the {heads} heads: {works} does"
            )
        if config.dt_limit_min < 0:
            raise FieldError("dt_limit_min", f"must be at least 0, got {config.dt_limit_min}")
        if config.dt_limit_max is not None and config.dt_limit_max <= config.dt_limit_min:
            raise FieldError(
                "dt_limit_max",
                f"must be above dt_limit_min = {config.dt_limit_min}, got {config.dt_limit_max}; "
                "null sets no limit",
            )

    @classmethod
    def costs(
        cls, d_model: int, config: Mamba2Config, *, length: int, bytes_per_element: int = 4
    ) -> Costs:
        inner, heads = config.d_inner(d_model), config.heads(d_model)
        n, shared = config.d_state, config.n_groups * config.d_state
        channels, width = inner + 2 * shared, config.d_conv
        rows = inner + channels + heads
        parameters = d_model * rows + channels * width + 3 * heads + inner + inner * d_model
        parameters += channels * config.conv_bias + (rows + d_model) * config.bias
        projections = 2 * d_model * rows + 2 * width * channels + 2 * inner * d_model
        chunk = min(config.chunk_size, length)
        state_bytes = channels * width * bytes_per_element
        state_bytes += inner * n * max(bytes_per_element, STATE_BYTES)
        return Costs(
            parameters=parameters,
            forward_flops=(projections + 2 * chunk * (shared + inner) + 4 * n * inner) * length,
            decode_flops=projections + 5 * inner * n,
            state_bytes=state_bytes,
            decode_state_bytes=2 * state_bytes,
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A is uniform in [-16, -1], step sizes are log-uniform, all as published."""
        self.conv1d.reset_parameters()
        init_dt_bias(self.dt_bias, self.config)
        self.A_log.copy_(torch.empty_like(self.A_log, dtype=torch.float32).uniform_(1, 16).log_())
        nn.init.ones_(self.D)
        self.norm.reset_parameters()

    def init_state(
        self,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Mamba2State:
        """Zeros; its size does not depend on `max_length`."""
        weight, config = self.conv1d.weight, self.config
        device = weight.device if device is None else device
        dtype = dtype or weight.dtype
        conv = (batch_size, len(weight), config.d_conv)
        ssm = (batch_size, self.heads, config.headdim, config.d_state)
        return Mamba2State(
            torch.zeros(conv, device=device, dtype=dtype),
            torch.zeros(ssm, device=device, dtype=self.state_dtype or at_least_float32(dtype)),
        )

    def backends(self, dtype: torch.dtype) -> dict[str, str]:
        """With `triton`, the kernels take in convolution and gated norm too, but for padding."""
        device_type, channels = self.A_log.device.type, self.conv1d.weight.shape[0]
        ssd_on = ssd_backend(device_type, dtype, self.config.headdim, self.config.d_state)
        if ssd_on == "triton" and type(self.norm) is RMSNorm:
            return {"ssd": ssd_on, "causal_conv1d": ssd_on}
        conv_on = conv_backend(device_type, dtype, channels, self.in_proj.out_features)
        return {"ssd": ssd_on, "causal_conv1d": conv_on}

    def forward(
        self, x_BTD: Tensor, context: Context = PLAIN, state: Mamba2State | None = None
    ) -> Tensor:
        zxbcdt_BTR = self.in_proj(x_BTD)
        if self._is_fused(zxbcdt_BTR, context, state):
            return self._fused(zxbcdt_BTR, context, state)
        z_BTI, xBC_BTC, dt_BTH = self._parts(zxbcdt_BTR)
        # Masked here, not before in_proj: its bias would make padding differ from no token.
        xBC_BTC, conv_BCW = causal_conv1d(
            context.mask_padding(xBC_BTC),
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            initial_state_BCW=None if state is None else state.conv_BCW,
            seq_idx_BL=context.seq_idx_BT,
        )
        x_BTHP, B_BTGN, C_BTGN = self._split(xBC_BTC)
        y_BTHP, ssm_BHPN = ssd(
            x_BTHP,
            context.mask_padding(dt_BTH),  # a step of zero leaves the state as it is
            self._decay(),
            B_BTGN,
            C_BTGN,
            self.D,
            chunk_size=self.config.chunk_size,
            initial_state_BHPN=None if state is None else state.ssm_BHPN,
            seq_idx_BL=context.seq_idx_BT,
        )
        if state is not None:
            state.conv_BCW.copy_(conv_BCW.detach())
            state.ssm_BHPN.copy_(ssm_BHPN.detach())
        return self.out_proj(self.norm(y_BTHP.flatten(-2), z_BTI))  # type: ignore[no-any-return]

    def step(self, x_BD: Tensor, state: Mamba2State, context: Context = PLAIN) -> Tensor:
        zxbcdt_BR = self.in_proj(x_BD)
        if self._runs_on_triton(zxbcdt_BR):
            from workbench_mamba.kernels.mamba2_step import mamba2_step

            y_BI = mamba2_step(
                *(zxbcdt_BR, state.conv_BCW, state.ssm_BHPN, *self._inner_weights()),
                *(self.config.n_groups, self.norm.groups, self.norm.eps, *self._dt_limits()),
            )
            return self.out_proj(y_BI)  # type: ignore[no-any-return]
        z_BI, xBC_BC, dt_BH = self._parts(zxbcdt_BR)
        weight_CW = self.conv1d.weight.squeeze(1)
        xBC_BC = causal_conv1d_update(state.conv_BCW, xBC_BC, weight_CW, self.conv1d.bias, "silu")
        x_BHP, B_BGN, C_BGN = self._split(xBC_BC)
        y_BHP = ssd_state_update(state.ssm_BHPN, x_BHP, dt_BH, self._decay(), B_BGN, C_BGN, self.D)
        return self.out_proj(self.norm(y_BHP.flatten(-2), z_BI))  # type: ignore[no-any-return]

    def _decay(self) -> Tensor:
        """A, negative, at least in float32."""
        return -upcast(self.A_log).exp()

    def _runs_on_triton(self, zxbcdt: Tensor) -> bool:
        device_type, config = zxbcdt.device.type, self.config
        backend = ssd_backend(device_type, zxbcdt.dtype, config.headdim, config.d_state)
        # A subclass may gate without a norm, which the kernels do not know.
        return backend == "triton" and type(self.norm) is RMSNorm

    def _is_fused(self, zxbcdt_BTR: Tensor, context: Context, state: Mamba2State | None) -> bool:
        """Whether one operator does all between the projections; it knows no padding."""
        if context.attention_mask_BT is not None or not self._runs_on_triton(zxbcdt_BTR):
            return False
        return state is None or not torch.is_grad_enabled()

    def _fused(self, zxbcdt_BTR: Tensor, context: Context, state: Mamba2State | None) -> Tensor:
        """All that follows the input projection, `[B, T, D]`."""
        from workbench_mamba.kernels.mamba2_inner import mamba2_inner

        out_weight_DI = None
        if is_plain(self.out_proj):
            out_weight_DI = self.out_proj.weight.to(zxbcdt_BTR.dtype)
        conv_BCW = None if state is None else state.conv_BCW
        y_BT, ssm_BHPN = mamba2_inner(
            zxbcdt_BTR,
            *self._inner_weights(),
            out_weight_DI=out_weight_DI,
            groups=self.config.n_groups,
            norm_groups=self.norm.groups,
            eps=self.norm.eps,
            dt_limits=self._dt_limits(),
            seq_idx_BL=context.seq_idx_BT,
            conv_state_BCW=conv_BCW,
            state_BHPN=None if state is None else state.ssm_BHPN,
        )
        if state is not None:
            channels = self.inner + 2 * self.group_channels
            xBC_BTC = zxbcdt_BTR[..., self.inner : self.inner + channels]
            state.conv_BCW.copy_(last_inputs(xBC_BTC, state.conv_BCW, context.seq_idx_BT))
            state.ssm_BHPN.copy_(ssm_BHPN)
        return self.out_proj(y_BT) if out_weight_DI is None else y_BT

    def _inner_weights(self) -> tuple[Any, ...]:
        """Filter, its bias (or None), step sizes' bias, A_log, D and the norm's weight."""
        weight_CW, bias_C = self.conv1d.weight.squeeze(1), self.conv1d.bias
        return weight_CW, bias_C, self.dt_bias, self.A_log, self.D, self.norm.weight

    def _dt_limits(self) -> tuple[float, float | None]:
        return self.config.dt_limit_min, self.config.dt_limit_max

    def _parts(self, zxbcdt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gate `[..., I]`, the convolution's input `[..., C]`, step sizes `[..., H]` in float32."""
        widths = [self.inner, self.inner + 2 * self.group_channels, self.heads]
        z, xBC, dt = torch.split(zxbcdt, widths, -1)
        dt = F.softplus(upcast(dt) + upcast(self.dt_bias))
        low, high = self._dt_limits()
        return z, xBC, dt if (low, high) == (0.0, None) else dt.clamp(low, high)

    def _split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x `[..., H, P]`, B and C `[..., G, N]` of the convolution's output `[..., C]`."""
        x, B, C = torch.split(xBC, [self.inner, self.group_channels, self.group_channels], -1)
        groups = (self.config.n_groups, self.config.d_state)
        return (
            torch.unflatten(x, -1, (self.heads, self.config.headdim)),
            torch.unflatten(B, -1, groups),
            torch.unflatten(C, -1, groups),
        )
