"""Mamba: a selective state space layer, one state of size N a channel.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752.
With `dt_bc_norm`, the RMSNorms on dt, B and C of Jamba (Lieber et al., arXiv:2403.19887).
Parameters are named as published, so a reference's state dict loads as it is.

Shape suffixes: B batch, T tokens, D d_model, C inner channels, N state, R rank of dt, W width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.config import Choice, Range
from workbench.costs import Costs
from workbench.layer import PLAIN, Context, Kind, Layer, State
from workbench_mamba.common import (
    STATE_BYTES,
    at_least_float32,
    check_shared,
    init_dt_bias,
    is_plain,
    require_at_least_one,
    upcast,
)
from workbench_mamba.kernels import causal_conv1d, conv_backend, scan_backend, selective_scan
from workbench_mamba.norms import RMSNorm
from workbench_mamba.scan import causal_conv1d_update, last_inputs, selective_state_update


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """Hyper-parameters of Mamba, under their published names."""

    d_state: Annotated[int, Choice(8, 16, 32), "State size N of each channel"] = 16
    d_conv: Annotated[int, Range(2, 4), "Width of the causal convolution"] = 4
    expand: Annotated[int, Choice(1, 2, 3, 4), "Inner channels as a multiple of d_model"] = 2
    dt_rank: Annotated[int | None, "Rank of the step sizes' projection; null: d_model / 16"] = None
    conv_bias: Annotated[bool, "Bias in the convolution"] = True
    bias: Annotated[bool, "Bias in in_proj and out_proj"] = False
    dt_bc_norm: Annotated[bool, Choice(False, True), "RMSNorm on dt, B and C (Jamba)"] = False
    norm_eps: Annotated[float, "Added to the mean square in the layer's own norms"] = 1e-6
    dt_min: Annotated[float, "Least initial step size"] = 1e-3
    dt_max: Annotated[float, "Greatest initial step size"] = 0.1
    dt_init_floor: Annotated[float, "No initial step size is below it"] = 1e-4

    def d_inner(self, d_model: int) -> int:
        """Number of inner channels C."""
        return self.expand * d_model

    def rank(self, d_model: int) -> int:
        """R: `dt_rank`, or a sixteenth of d_model, rounded up."""
        return math.ceil(d_model / 16) if self.dt_rank is None else self.dt_rank


@dataclasses.dataclass
class MambaState(State):
    """The last inputs of the convolution, and the recurrence's state, at least in float32."""

    conv_BCW: Tensor
    ssm_BCN: Tensor


class Mamba(Layer):
    """Convolution and selective scan between an input and an output projection, gated.

    Padding may stand on either side of a row. A call that fills a state wants it on the left, as
    in Hugging Face's generation: after right padding the outputs at real tokens are right, but
    the convolution's window is not that of the last real token. With `seq_idx` and a state, the
    state belongs to the first document of the call. `prefix_lengths` has no effect: the
    recurrence stays causal.
    """

    Config: ClassVar[type] = MambaConfig
    kind: ClassVar[Kind] = "recurrent"
    glyph = "M"
    reference = "arXiv:2312.00752; dt_bc_norm: Jamba, arXiv:2403.19887"
    keep_precision: ClassVar[Mapping[str, str]] = {
        "x_proj": "small, and its rows of dt, B and C differ in scale",
        "dt_proj": "its rank is below any quantization group, and its weight is read directly",
    }
    output_projection = "out_proj"

    def __init__(
        self,
        d_model: int,
        config: MambaConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, config)
        inner, self.rank, n = config.d_inner(d_model), config.rank(d_model), config.d_state
        self.in_proj = self._linear("in_proj", d_model, 2 * inner, config.bias, device, dtype)
        self.conv1d = nn.Conv1d(
            inner,
            inner,
            config.d_conv,
            padding=config.d_conv - 1,
            groups=inner,
            bias=config.conv_bias,
            device=device,
            dtype=dtype,
        )
        self.x_proj = self._linear("x_proj", inner, self.rank + 2 * n, False, device, dtype)
        self.dt_proj = self._linear("dt_proj", self.rank, inner, True, device, dtype)
        self.A_log = nn.Parameter(torch.empty(inner, n, device=device, dtype=dtype))
        self.D = nn.Parameter(torch.empty(inner, device=device, dtype=dtype))
        self.out_proj = self._linear("out_proj", inner, d_model, config.bias, device, dtype)
        if config.dt_bc_norm:
            self.dt_layernorm = RMSNorm(self.rank, eps=config.norm_eps, device=device, dtype=dtype)
            self.b_layernorm = RMSNorm(n, eps=config.norm_eps, device=device, dtype=dtype)
            self.c_layernorm = RMSNorm(n, eps=config.norm_eps, device=device, dtype=dtype)

    def _linear(self, name: str, *arguments: Any) -> nn.Linear:
        """The projection `name`, of nn.Linear's arguments."""
        return nn.Linear(*arguments)

    @classmethod
    def check(cls, d_model: int, config: MambaConfig) -> None:
        require_at_least_one(config, "d_state", "expand", "dt_rank")
        check_shared(config)

    @classmethod
    def costs(
        cls, d_model: int, config: MambaConfig, *, length: int, bytes_per_element: int = 4
    ) -> Costs:
        inner, rank = config.d_inner(d_model), config.rank(d_model)
        n, width = config.d_state, config.d_conv
        parameters = 3 * d_model * inner + inner * (width + 2 * rank + 3 * n + 2)
        parameters += inner * config.conv_bias + (2 * inner + d_model) * config.bias
        parameters += (rank + 2 * n) * config.dt_bc_norm
        projections = 6 * d_model * inner + 2 * width * inner + 4 * inner * (rank + n)
        state_bytes = inner * (width * bytes_per_element + n * max(bytes_per_element, STATE_BYTES))
        return Costs(
            parameters=parameters,
            forward_flops=(projections + 9 * inner * n) * length,
            decode_flops=projections + 6 * inner * n,
            state_bytes=state_bytes,
            decode_state_bytes=2 * state_bytes,
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A is S4D-real (-1, …, -N), step sizes are log-uniform, all as published."""
        self.conv1d.reset_parameters()
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        init_dt_bias(self.dt_proj.bias, self.config)
        n = self.config.d_state
        self.A_log.copy_(
            torch.arange(1, n + 1, device=self.A_log.device).log().expand(len(self.D), n)
        )
        nn.init.ones_(self.D)
        for module in self.children():
            if isinstance(module, RMSNorm):
                module.reset_parameters()

    def init_state(
        self,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MambaState:
        """Zeros; its size does not depend on `max_length`."""
        weight = self.conv1d.weight
        device = weight.device if device is None else device
        dtype = dtype or weight.dtype
        inner, n = self.A_log.shape
        conv, ssm = (batch_size, inner, self.config.d_conv), (batch_size, inner, n)
        return MambaState(
            torch.zeros(conv, device=device, dtype=dtype),
            torch.zeros(ssm, device=device, dtype=at_least_float32(dtype)),
        )

    def backends(self, dtype: torch.dtype) -> dict[str, str]:
        """With `triton`, the kernels take in the convolution too, but for padding."""
        device_type, (channels, d_state) = self.A_log.device.type, self.A_log.shape
        scan_on = scan_backend(device_type, dtype, d_state)
        conv_on = conv_backend(device_type, dtype, channels, 2 * channels)
        is_fused = scan_on == "triton" and self._is_published()
        return {"selective_scan": scan_on, "causal_conv1d": scan_on if is_fused else conv_on}

    def forward(
        self, x_BTD: Tensor, context: Context = PLAIN, state: MambaState | None = None
    ) -> Tensor:
        xz_BTR = self.in_proj(x_BTD)
        if self._is_fused(xz_BTR, context, state):
            return self._fused(xz_BTR, context, state)
        x_BTC, z_BTC = xz_BTR.chunk(2, -1)
        # Masked here, not before in_proj: its bias would make padding differ from no token.
        x_BTC, conv_BCW = causal_conv1d(
            context.mask_padding(x_BTC),
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            initial_state_BCW=None if state is None else state.conv_BCW,
            seq_idx_BL=context.seq_idx_BT,
        )
        dt_BTC, bias_C, B_BTN, C_BTN = self._select(x_BTC)
        is_raw = context.attention_mask_BT is None
        if not is_raw:  # a step of zero leaves the state as it is
            dt_BTC, bias_C = context.mask_padding(_step_sizes(dt_BTC, bias_C)), None
        y_BTC, ssm_BCN = selective_scan(
            x_BTC,
            dt_BTC,
            self._decay(),
            B_BTN,
            C_BTN,
            self.D,
            delta_bias_D=bias_C,
            delta_softplus=is_raw,
            initial_state_BDN=None if state is None else state.ssm_BCN,
            seq_idx_BL=context.seq_idx_BT,
        )
        if state is not None:
            state.conv_BCW.copy_(conv_BCW.detach())
            state.ssm_BCN.copy_(ssm_BCN.detach())
        return self._output(y_BTC, z_BTC)

    def step(self, x_BD: Tensor, state: MambaState, context: Context = PLAIN) -> Tensor:
        x_BC, z_BC = self.in_proj(x_BD).chunk(2, -1)
        weight_CW = self.conv1d.weight.squeeze(1)
        x_BC = causal_conv1d_update(state.conv_BCW, x_BC, weight_CW, self.conv1d.bias, "silu")
        dt_BC, bias_C, B_BN, C_BN = self._select(x_BC)
        delta_BC = _step_sizes(dt_BC, bias_C)
        y_BC = selective_state_update(
            state.ssm_BCN, x_BC, delta_BC, self._decay(), B_BN, C_BN, self.D
        )
        return self._output(y_BC, z_BC)

    def _is_published(self) -> bool:
        """Whether all between the projections is as published, and the selection read directly."""
        if type(self) is not Mamba or self.config.dt_bc_norm:
            return False
        return is_plain(self.x_proj) and type(self.dt_proj) is nn.Linear

    def _is_fused(self, xz_BTR: Tensor, context: Context, state: MambaState | None) -> bool:
        """Whether one operator does all between the projections; it knows no padding."""
        if context.attention_mask_BT is not None or not self._is_published():
            return False
        if state is not None and torch.is_grad_enabled():
            return False
        d_state = self.config.d_state
        return scan_backend(xz_BTR.device.type, xz_BTR.dtype, d_state) == "triton"

    def _fused(self, xz_BTR: Tensor, context: Context, state: MambaState | None) -> Tensor:
        """All that follows the input projection, `[B, T, D]`."""
        from workbench_mamba.kernels.mamba_inner import mamba_inner

        dtype = xz_BTR.dtype
        out_weight_DC = self.out_proj.weight.to(dtype) if is_plain(self.out_proj) else None
        y_BT, ssm_BCN = mamba_inner(
            *(xz_BTR, self.conv1d.weight.squeeze(1), self.conv1d.bias),
            *(self.x_proj.weight.to(dtype), self.dt_proj.weight.to(dtype), self.dt_proj.bias),
            *(self._decay(), self.D),
            out_weight_DC=out_weight_DC,
            seq_idx_BL=context.seq_idx_BT,
            conv_state_BCW=None if state is None else state.conv_BCW,
            state_BCN=None if state is None else state.ssm_BCN,
        )
        if state is not None:
            x_BTC = xz_BTR.chunk(2, -1)[0]
            state.conv_BCW.copy_(last_inputs(x_BTC, state.conv_BCW, context.seq_idx_BT))
            state.ssm_BCN.copy_(ssm_BCN)
        return self.out_proj(y_BT) if out_weight_DC is None else y_BT

    def _decay(self) -> Tensor:
        """A, negative, at least in float32."""
        return -upcast(self.A_log).exp()

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Step sizes as `_dt` gives them, and B and C `[..., N]`, of `x` `[..., C]`."""
        n = self.config.d_state
        dt, B, C = self.x_proj(x).split([self.rank, n, n], -1)
        if self.config.dt_bc_norm:
            dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
        return *self._dt(dt), B, C

    def _dt(self, dt: Tensor) -> tuple[Tensor, Tensor | None]:
        """`[..., R]` to step sizes before bias and softplus, `[..., C]`, and the bias, if any."""
        return F.linear(dt, self.dt_proj.weight), self.dt_proj.bias

    def _output(self, y: Tensor, z: Tensor) -> Tensor:
        """Gate and project `[..., C]` to `[..., D]`."""
        return self.out_proj(y * F.silu(z))  # type: ignore[no-any-return]


def _step_sizes(dt: Tensor, bias_C: Tensor | None) -> Tensor:
    """Positive, at least float32."""
    # The bias outweighs the product: added in bfloat16 it would move step sizes by percents.
    return F.softplus(upcast(dt) if bias_C is None else upcast(dt) + upcast(bias_C))
