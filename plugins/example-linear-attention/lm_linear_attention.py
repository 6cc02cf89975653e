"""Causal linear attention (Katharopoulos et al. 2020, arXiv:2006.16236) as a workbench plugin.

Shape suffixes: B batch, T tokens, S keys, H heads, K head width, C = K + 1, D d_model.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.config import Choice
from workbench.costs import Costs
from workbench.errors import FieldError
from workbench.hookspecs import Register, hookimpl
from workbench.layer import PLAIN, Context, Layer, State


@dataclasses.dataclass
class Sums(State):
    past_BHKC: Tensor  # sum over the past of φ(k) [v, 1]: values beside their normaliser


class LinearAttention(Layer):
    """exp(q·k) of softmax becomes φ(q)·φ(k), φ = elu + 1, so the past is a sum of fixed size."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        num_heads: Annotated[int, Choice(1, 2, 4, 8), "heads"] = 4

    kind, glyph, output_projection = "recurrent", "L", "o_proj"
    reference = "Katharopoulos et al. 2020, arXiv:2006.16236"

    def __init__(self, d_model: int, config: Config, **factory: Any) -> None:
        super().__init__(d_model, config)
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=False, **factory)
        self.o_proj = nn.Linear(d_model, d_model, bias=False, **factory)

    @classmethod
    def check(cls, d_model: int, config: Config) -> None:
        if d_model % config.num_heads:
            raise FieldError("num_heads", f"{config.num_heads} must divide d_model = {d_model}")

    @classmethod
    def costs(cls, d_model, config, *, length, bytes_per_element=4) -> Costs:
        weights, sums = 4 * d_model**2, d_model * (d_model // config.num_heads + 1)
        return Costs(
            parameters=weights,
            forward_flops=2 * length * (weights + length * (2 * d_model + config.num_heads)),
            decode_flops=2 * (weights + 2 * d_model + config.num_heads) + 4 * sums,
            state_bytes=sums * bytes_per_element,
            decode_state_bytes=2 * sums * bytes_per_element,
        )

    def init_state(self, batch_size: int, max_length: int, **factory: Any) -> Sums:
        heads, width = self.config.num_heads, self.d_model // self.config.num_heads
        return Sums(torch.zeros(batch_size, heads, width, width + 1, **factory))

    def forward(self, x_BTD: Tensor, context: Context = PLAIN, state: Sums | None = None) -> Tensor:
        qkv_BTHK = self.qkv_proj(x_BTD).unflatten(-1, (3 * self.config.num_heads, -1))
        q_BHTK, k_BHSK, v_BHSK = qkv_BTHK.transpose(1, 2).chunk(3, dim=1)
        q_BHTK, k_BHSK, v_BHSC = (
            F.elu(q_BHTK) + 1,
            F.elu(k_BHSK) + 1,
            F.pad(v_BHSK, (0, 1), value=1),
        )
        if context.attention_mask_BT is not None:
            k_BHSK = k_BHSK * context.attention_mask_BT[:, None, :, None]
        document_BT = context.seq_idx_BT
        if document_BT is None:
            document_BT = torch.zeros(x_BTD.shape[:2], device=x_BTD.device)
        same_BHTS = (document_BT[:, :, None] == document_BT[:, None]).to(x_BTD.dtype)[:, None]
        sums_BHTC = ((q_BHTK @ k_BHSK.mT) * same_BHTS).tril() @ v_BHSC
        if state is not None:  # it belongs to the document that this call starts in
            first_BHT1, last_BHS1 = same_BHTS[..., :1], same_BHTS[..., -1:, :].mT
            sums_BHTC = sums_BHTC + (q_BHTK * first_BHT1) @ state.past_BHKC
            state.past_BHKC *= first_BHT1[:, :, -1:]
            state.past_BHKC += (k_BHSK * last_BHS1).mT @ v_BHSC
        y_BHTK = sums_BHTC[..., :-1] / (sums_BHTC[..., -1:] + 1e-6)
        return self.o_proj(y_BHTK.transpose(1, 2).flatten(2))  # `step` is this on one token


@hookimpl
def register_layers(register: Register[type[Layer]]) -> None:
    register("linear-attention", LinearAttention)
