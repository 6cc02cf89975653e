"""Mixture-of-experts SwiGLU: a router sends each token to a few of many MLPs. No token is dropped.

Shazeer et al. 2017 (arXiv:1701.06538), in the forms of Mixtral (arXiv:2401.04088), Jamba
(arXiv:2403.19887), Qwen3 (arXiv:2505.09388) and Granite 4, with the load-balance loss of Switch
(arXiv:2101.03961) and the router z-loss of ST-MoE (arXiv:2202.08906).

Shape suffixes: B batch, T tokens in this call, N = B·T tokens, E experts, K experts a token,
M = N·K tokens with their choices, D d_model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from workbench.config import Choice, Range
from workbench.costs import Costs
from workbench.errors import FieldError
from workbench.hookspecs import Register, hookimpl
from workbench.layer import PLAIN, Context, Layer, State
from workbench_mlp.swiglu import SwiGLU, SwiGLUConfig

Router = Literal["softmax", "renormalized", "topk_softmax"]


@dataclass(frozen=True, kw_only=True)
class MixtureOfExpertsConfig:
    """How many experts of which width, how they are chosen, and what keeps them busy.

    `router` says how much a token's K chosen experts count:

    - `softmax`: their share among all experts, left below a sum of 1 (Jamba, Qwen1.5-MoE);
    - `renormalized`: that share divided by its sum (Mixtral, Qwen3);
    - `topk_softmax`: the softmax of their logits alone (Granite): `renormalized` but for rounding.
    """

    num_experts: Annotated[int, Choice(4, 8, 16), "Experts to choose from"] = 8
    top_k: Annotated[int, Choice(1, 2, 4), "Experts that a token uses"] = 2
    intermediate_size: Annotated[
        int | None, "Inner width of an expert; null: expand * d_model rounded up to multiple_of"
    ] = None
    expand: Annotated[float, Range(0.5, 4.0), "Inner width of an expert over d_model"] = 4 / 3
    multiple_of: Annotated[int, "Inner widths are rounded up to a multiple of it"] = 32
    router: Annotated[
        Router, Choice("softmax", "renormalized"), "How the chosen experts are weighted"
    ] = "renormalized"
    shared_intermediate_size: Annotated[
        int | None, "Inner width of the expert that every token uses; null: by shared_expand"
    ] = None
    shared_expand: Annotated[
        float, Choice(0.0, 0.5, 1.0, 2.0), "Its inner width over d_model; 0: no such expert"
    ] = 0.0
    shared_gate: Annotated[bool, "A sigmoid gate a token on the shared expert (Qwen)"] = False
    aux_loss_weight: Annotated[
        float, Range(1e-3, 0.1, log=True), "Weight of the load-balance loss in training"
    ] = 0.01
    z_loss_weight: Annotated[float, "Weight of the router's z-loss in training"] = 0.0

    @property
    def has_shared_expert(self) -> bool:
        return self.shared_intermediate_size is not None or self.shared_expand != 0

    def expert(self) -> SwiGLUConfig:
        """One routed expert."""
        return SwiGLUConfig(
            intermediate_size=self.intermediate_size,
            expand=self.expand,
            multiple_of=self.multiple_of,
        )

    def shared_expert(self) -> SwiGLUConfig:
        """The expert that every token uses; only where there is one."""
        if self.shared_intermediate_size is not None:
            return SwiGLUConfig(intermediate_size=self.shared_intermediate_size)
        return SwiGLUConfig(expand=self.shared_expand, multiple_of=self.multiple_of)


class MixtureOfExperts(Layer):
    """`sum of w_e * expert_e(x)` over a token's K experts, plus a shared expert if there is one.

    Experts are `SwiGLU`s of plain linears, so quantizers and Muon treat them as any other. FLOPs do
    not depend on the routing, as no token is dropped. The losses of the router are computed only
    where someone collects them (`Context.losses`), and over real tokens only.

    Without gradients an expert that no token chose is not touched: a decode step of one sequence
    reads K experts. In training every expert runs, on no rows if need be: its gradient is then 0
    and not None, so the optimizer counts its steps alike. The host reads how many tokens each
    expert got, once a call: a CUDA graph cannot capture it, and `torch.compile` without a graph
    break needs `torch._dynamo.config.capture_scalar_outputs`.
    """

    Config = MixtureOfExpertsConfig
    kind = "mlp"
    glyph = "E"
    host_synchronized = True
    reference = (
        "arXiv:1701.06538; transformers MixtralSparseMoeBlock, JambaSparseMoeBlock, "
        "GraniteMoeHybridMoE, Qwen3NextSparseMoeBlock"
    )
    keep_precision: ClassVar[Mapping[str, str]] = {
        "router": "tiny, and a rounded logit sends a token to another expert",
        "shared_expert_gate": "one row, and it scales a whole expert",
    }

    def __init__(
        self,
        d_model: int,
        config: MixtureOfExpertsConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, config)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.router = nn.Linear(d_model, config.num_experts, bias=False, **factory)
        self.experts = nn.ModuleList(
            SwiGLU(d_model, config.expert(), **factory) for _ in range(config.num_experts)
        )
        if config.has_shared_expert:
            self.shared_expert = SwiGLU(d_model, config.shared_expert(), **factory)
        if config.shared_gate:
            self.shared_expert_gate = nn.Linear(d_model, 1, bias=False, **factory)

    @classmethod
    def check(cls, d_model: int, config: MixtureOfExpertsConfig) -> None:
        if config.num_experts < 1:
            raise FieldError("num_experts", f"must be at least 1, got {config.num_experts}")
        if not 1 <= config.top_k <= config.num_experts:
            limit = f"must be between 1 and num_experts = {config.num_experts}"
            raise FieldError("top_k", f"{limit}, got {config.top_k}")
        if config.top_k == 1 < config.num_experts and config.router != "softmax":
            raise FieldError(
                "router",
                f"{config.router} gives a single expert the weight 1, whatever the router says, so "
                "that it learns nothing: use softmax, or top_k above 1",
            )
        SwiGLU.check(d_model, config.expert())
        _check_shared(d_model, config)
        for name in ("aux_loss_weight", "z_loss_weight"):
            if getattr(config, name) < 0:
                raise FieldError(name, f"must not be negative, got {getattr(config, name)}")

    @classmethod
    def costs(
        cls,
        d_model: int,
        config: MixtureOfExpertsConfig,
        *,
        length: int,
        bytes_per_element: int = 4,
    ) -> Costs:
        expert = SwiGLU.costs(d_model, config.expert(), length=length)
        gates = d_model * (config.num_experts + config.shared_gate)
        always = Costs(parameters=gates, forward_flops=2 * gates * length, decode_flops=2 * gates)
        if config.has_shared_expert:
            always += SwiGLU.costs(d_model, config.shared_expert(), length=length)
        return Costs(
            parameters=always.parameters + config.num_experts * expert.parameters,
            active_parameters=always.parameters + config.top_k * expert.parameters,
            forward_flops=always.forward_flops + config.top_k * expert.forward_flops,
            decode_flops=always.decode_flops + config.top_k * expert.decode_flops,
        )

    def forward(
        self, x_BTD: Tensor, context: Context = PLAIN, state: State | None = None
    ) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        logits_NE = self._logits(x_ND)
        weights_NK, chosen_NK = route(logits_NE, self.config.top_k, self.config.router)
        if context.losses is not None:
            self._add_losses(logits_NE, chosen_NK, context)
        y_NKD = self._run_experts(x_ND, chosen_NK)
        y_ND = (y_NKD * weights_NK[..., None]).sum(1).to(y_NKD.dtype)
        if self.config.has_shared_expert:
            shared_ND = self.shared_expert(x_ND)
            if self.config.shared_gate:
                shared_ND = shared_ND * self.shared_expert_gate(x_ND).sigmoid()
            y_ND = y_ND + shared_ND
        return y_ND.view(x_BTD.shape)

    def _logits(self, x_ND: Tensor) -> Tensor:
        """The router's logits, at least in float32."""
        # In bfloat16 rounding would decide near ties: Switch's "selective precision".
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = self.router(x_ND.to(self.router.weight.dtype))
        return logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32))  # type: ignore[no-any-return]

    def _run_experts(self, x_ND: Tensor, chosen_NK: Tensor) -> Tensor:
        """What each token's chosen experts make of it, `[N, K, D]`."""
        chosen_M = chosen_NK.flatten()
        order_M = chosen_M.argsort(stable=True)
        numbers_E = torch.arange(len(self.experts), device=x_ND.device)
        counts_E = (chosen_M[:, None] == numbers_E).sum(0)
        # Copies first and then a permutation: backward then adds to no row twice, in which order
        # it would be left to chance (threads on a CPU, atomics on a GPU).
        x_MD = x_ND[:, None].expand(-1, chosen_NK.shape[1], -1).flatten(0, 1)[order_M]
        parts = torch.split(x_MD, counts_E.tolist())
        run_all = torch.is_grad_enabled() or torch.compiler.is_compiling()
        y_MD = torch.cat(
            [
                expert(part_MD)
                for expert, part_MD in zip(self.experts, parts, strict=True)
                if run_all or part_MD.shape[0]
            ]
        )
        return y_MD[order_M.argsort()].view(*chosen_NK.shape, -1)

    def _add_losses(self, logits_NE: Tensor, chosen_NK: Tensor, context: Context) -> None:
        real_N = None
        if context.attention_mask_BT is not None:
            real_N = context.attention_mask_BT.flatten()
        if self.config.aux_loss_weight:
            balance = load_balance_loss(logits_NE, chosen_NK, real_N)
            context.add_loss(self.config.aux_loss_weight * balance)
        if self.config.z_loss_weight:
            context.add_loss(self.config.z_loss_weight * router_z_loss(logits_NE, real_N))


def _check_shared(d_model: int, config: MixtureOfExpertsConfig) -> None:
    if config.has_shared_expert:
        try:
            SwiGLU.check(d_model, config.shared_expert())
        except FieldError as error:
            raise FieldError(f"shared_{error.field}", error.message) from None
    elif config.shared_gate:
        raise FieldError("shared_gate", "needs a shared expert: set shared_expand above 0")


def route(logits_NE: Tensor, top_k: int, router: Router) -> tuple[Tensor, Tensor]:
    """Weights and numbers of each token's experts, both `[N, K]`; see `MixtureOfExpertsConfig`."""
    if router == "topk_softmax":
        chosen_logits_NK, chosen_NK = logits_NE.topk(top_k, dim=-1)
        return chosen_logits_NK.softmax(-1), chosen_NK
    weights_NK, chosen_NK = logits_NE.softmax(-1).topk(top_k, dim=-1)
    if router == "renormalized":
        weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
    return weights_NK, chosen_NK


def load_balance_loss(logits_NE: Tensor, chosen_NK: Tensor, real_N: Tensor | None = None) -> Tensor:
    """E · Σ_e (share of tokens that chose e) · (mean probability of e), as Mixtral's.

    K where the load is even, E where all tokens are sure of the same experts; for K = 1 it is
    Switch's (arXiv:2101.03961, equations 4 to 6).

    Args:
        real_N: bool, False for padding, which does not count.
    """
    num_experts = logits_NE.shape[-1]
    numbers_E = torch.arange(num_experts, device=logits_NE.device)
    chose_NE = (chosen_NK[..., None] == numbers_E).any(1).to(logits_NE.dtype)
    shares_E = _mean(chose_NE, real_N)
    return num_experts * (shares_E * _mean(logits_NE.softmax(-1), real_N)).sum()


def router_z_loss(logits_NE: Tensor, real_N: Tensor | None = None) -> Tensor:
    """The mean square of a token's log-sum-exp of logits (ST-MoE, arXiv:2202.08906)."""
    return _mean(logits_NE.logsumexp(-1, keepdim=True).square(), real_N).sum()


def _mean(values_NE: Tensor, real_N: Tensor | None) -> Tensor:
    """The mean over real tokens, 0 where there are none."""
    if real_N is None:
        return values_NE.mean(0)
    real_N1 = real_N[:, None].to(values_NE.dtype)
    return (values_NE * real_N1).sum(0) / real_N1.sum().clamp(min=1)


@hookimpl
def register_layers(register: Register[type[Layer]]) -> None:
    register("moe", MixtureOfExperts)
