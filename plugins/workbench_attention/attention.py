"""Grouped-query attention with RoPE, ALiBi or no positions, and an optional sliding window.

Runs on torch's scaled_dot_product_attention on every device; weights are named as in transformers'
Llama, Qwen3, Mistral and Granite attention, whose state dicts load as they are.

Shape suffixes: B batch, T tokens in this call, D d_model, H query heads, K key-value heads,
G = H / K query heads a key-value head, P head dim, C = H P or K P channels, S keys seen.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.costs import Costs
from workbench.errors import WorkbenchError
from workbench.kernels import TORCH
from workbench.layer import PLAIN, Context, Layer
from workbench_attention.cache import KVCache
from workbench_attention.config import AttentionConfig, Heads, check
from workbench_attention.kernels import (
    attention_backend,
    causal_attention,
    step_backend,
)
from workbench_attention.masks import alibi_slopes, distances, visibility, with_alibi
from workbench_attention.rope import rotary_tables, rotate


class Attention(Layer):
    """Causal grouped-query attention; see `AttentionConfig`.

    A bidirectional prefix (`Context.prefix_lengths_B`) must lie wholly in a row's first call.

    Publishes what this call's queries attend to, for blocks that read this one: `keys` and `values`
    `[B, K, S, P]`, keys turned by their position, of every token in reach, this call's included
    (oldest first, but for a step of a full sliding window, whose oldest is overwritten in place);
    and `mask`, `[B or 1, H or 1, T, S]`, bool (True: seen) or added to the scores, or None for all
    that causality leaves.
    """

    Config = AttentionConfig
    kind = "attention"
    glyph = "A"
    reference = (
        "GQA, arXiv:2305.13245; RoPE, arXiv:2104.09864; ALiBi, arXiv:2108.12409; "
        "transformers LlamaAttention, Qwen3Attention, MistralAttention"
    )
    output_projection = "o_proj"

    def __init__(
        self,
        d_model: int,
        config: AttentionConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, config)
        heads = self.heads = Heads.of(d_model, config)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width, kv_width = heads.queries * heads.dim, heads.kv * heads.dim
        self.q_proj = nn.Linear(d_model, width, bias=config.bias, **factory)
        self.k_proj = nn.Linear(d_model, kv_width, bias=config.bias, **factory)
        self.v_proj = nn.Linear(d_model, kv_width, bias=config.bias, **factory)
        self.o_proj = nn.Linear(width, d_model, bias=config.out_bias, **factory)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(heads.dim, eps=config.norm_eps, **factory)
            self.k_norm = nn.RMSNorm(heads.dim, eps=config.norm_eps, **factory)
        self.scale = heads.dim**-0.5 if config.scale is None else config.scale

    @classmethod
    def check(cls, d_model: int, config: AttentionConfig) -> None:
        check(d_model, config)

    @classmethod
    def costs(
        cls, d_model: int, config: AttentionConfig, *, length: int, bytes_per_element: int = 4
    ) -> Costs:
        heads = Heads.of(d_model, config)
        width, kv_width = heads.queries * heads.dim, heads.kv * heads.dim
        weights = 2 * d_model * (width + kv_width)
        extras = (width + 2 * kv_width) * config.bias + d_model * config.out_bias
        window = config.sliding_window or length + 1
        # Token i sees min(i, window) keys, at two multiply-adds a channel and query head.
        full = min(length, window)
        keys_seen = full * (full + 1) // 2 + (length - full) * window
        slot_bytes = 2 * kv_width * bytes_per_element
        return Costs(
            parameters=weights + extras + 2 * heads.dim * config.qk_norm,
            forward_flops=2 * weights * length + 4 * width * keys_seen,
            decode_flops=2 * weights + 4 * width * min(length + 1, window),
            state_bytes=slot_bytes * full,
            decode_state_bytes=slot_bytes * min(length + 1, window),
        )

    def reset_parameters(self) -> None:
        if self.config.qk_norm:
            self.q_norm.reset_parameters()
            self.k_norm.reset_parameters()

    def init_state(
        self,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """An empty cache of `max_length` tokens, or of `sliding_window` where that is fewer."""
        window = self.config.sliding_window
        is_ring = window is not None and window <= max_length
        slots = window if is_ring else max_length
        shape = (batch_size, self.heads.kv, slots, self.heads.dim)
        # A quantized projection has no floating weight, but then it has scales.
        held = chain(self.parameters(), self.buffers())
        like = next(tensor for tensor in held if tensor.is_floating_point())
        return KVCache(
            keys_BHLP=like.new_zeros(shape, device=device, dtype=dtype),
            values_BHLP=like.new_zeros(shape, device=device, dtype=dtype),
            max_length=None if is_ring else max_length,
        )

    def backends(self, dtype: torch.dtype) -> dict[str, str]:
        device_type = next(chain(self.parameters(), self.buffers())).device.type
        return {
            "attention": attention_backend(device_type, dtype, self.heads.dim),
            "attention_step": self._step_backend(device_type, dtype),
        }

    def forward(
        self, x_BTD: Tensor, context: Context = PLAIN, state: KVCache | None = None
    ) -> Tensor:
        if state is None:
            q_BHTP, k_BKTP, v_BKTP = self._project(x_BTD, start=0)
            return self._output(self._attend(q_BHTP, k_BKTP, v_BKTP, context))
        if context.prefix_lengths_B is not None and state.length:
            raise WorkbenchError(
                "prefix_lengths belong to a row's first call: give the whole prefix in one prefill."
            )
        state.reserve(x_BTD.shape[1])
        q_BHTP, k_BKTP, v_BKTP = self._project(x_BTD, start=state.length)
        y_BHTP = self._attend(q_BHTP, k_BKTP, v_BKTP, context, state)
        state.extend(k_BKTP, v_BKTP, context)
        return self._output(y_BHTP)

    def step(self, x_BD: Tensor, state: KVCache, context: Context = PLAIN) -> Tensor:
        if state.position is None:
            state.reserve(1)
        start = state.length if state.position is None else state.position
        q_BH1P, k_BK1P, v_BK1P = self._project(x_BD[:, None], start)
        backend = self._kernel_of_step(q_BH1P, state, context)
        if backend != TORCH:
            from workbench_attention.cached import cached_attention

            tokens = (tensor.transpose(1, 2) for tensor in (q_BH1P, k_BK1P, v_BK1P))
            caches = state.keys_BHLP, state.values_BHLP
            y_B1HP = cached_attention(*tokens, *caches, state.position, self.scale, backend)
            state.position.add_(1)  # type: ignore[union-attr]
            return self.o_proj(y_B1HP.reshape(x_BD.shape[0], -1))  # type: ignore[no-any-return]
        state.append(k_BK1P, v_BK1P)
        # The query heads of a group stand in for its queries: SDPA then reads each key once.
        q_BKGP = q_BH1P.reshape(q_BH1P.shape[0], self.heads.kv, -1, self.heads.dim)
        k_BKSP, v_BKSP = (tensor.to(q_BKGP.dtype) for tensor in state.remembered())
        mask_BKGS = self._step_mask(state, q_BKGP)
        if context.published is not None:
            # From key-value heads and their groups to query heads; a head dimension of 1 stays.
            mask_BH1S = None if mask_BKGS is None else mask_BKGS.flatten(1, 2)[:, :, None]
            context.publish(keys=k_BKSP, values=v_BKSP, mask=mask_BH1S)
        y_BKGP = F.scaled_dot_product_attention(
            q_BKGP, k_BKSP, v_BKSP, attn_mask=mask_BKGS, scale=self.scale
        )
        return self.o_proj(y_BKGP.reshape(x_BD.shape[0], -1))  # type: ignore[no-any-return]

    def _kernel_of_step(self, q_BH1P: Tensor, state: KVCache, context: Context) -> str:
        """The backend that knows all that a step on a static state needs; torch's where none."""
        if state.position is None or state.visible_BL is not None:
            return TORCH
        if self.config.position == "alibi" or context.published is not None:
            return TORCH
        if state.keys_BHLP.dtype != q_BH1P.dtype:
            return TORCH
        return self._step_backend(q_BH1P.device.type, q_BH1P.dtype, state.max_length is None)

    def _step_backend(self, device_type: str, dtype: torch.dtype, is_ring: bool = False) -> str:
        group = self.heads.queries // self.heads.kv
        return step_backend(device_type, dtype, self.heads.dim, group, is_ring)

    def _project(self, x_BTD: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, H, T, P]`, keys and values `[B, K, T, P]` of the positions from `start`.

        `start` is a tensor where it is known on the device alone.
        """
        return self._in_heads(self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD), start)

    def _in_heads(
        self, q_BTC: Tensor, k_BTC: Tensor, v_BTC: Tensor, start: int | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What was projected, split into heads, normed and turned; see `_project`."""
        split = (*q_BTC.shape[:2], -1, self.heads.dim)
        q_BTHP, k_BTKP, v_BTKP = q_BTC.view(split), k_BTC.view(split), v_BTC.view(split)
        if self.config.qk_norm:
            q_BTHP, k_BTKP = _norm(self.q_norm, q_BTHP), _norm(self.k_norm, k_BTKP)
        if self.config.position == "rope":
            channels = self.heads.rotary(self.config)
            tables = rotary_tables(start, split[1], channels, self.config.rope_theta, q_BTHP)
            q_BTHP, k_BTKP = rotate(q_BTHP, *tables), rotate(k_BTKP, *tables)
        return q_BTHP.transpose(1, 2), k_BTKP.transpose(1, 2), v_BTKP.transpose(1, 2)

    def _attend(
        self,
        q_BHTP: Tensor,
        k_BKTP: Tensor,
        v_BKTP: Tensor,
        context: Context,
        state: KVCache | None = None,
    ) -> Tensor:
        """Attention of this call's queries to what is remembered and to this call's keys."""
        past_visible_BS = None
        if state is not None and state.length:
            past_k_BKSP, past_v_BKSP, past_visible_BS = state.past()
            k_BKTP = torch.cat((past_k_BKSP.to(k_BKTP.dtype), k_BKTP), dim=2)
            v_BKTP = torch.cat((past_v_BKSP.to(v_BKTP.dtype), v_BKTP), dim=2)
        num_past = 0 if state is None else state.filled
        if not num_past and self._needs_no_mask(q_BHTP, context):
            context.publish(keys=k_BKTP, values=v_BKTP, mask=None)
            window = self.config.sliding_window
            return causal_attention(q_BHTP, k_BKTP, v_BKTP, self.scale, window)
        seen_B1TS = visibility(
            q_BHTP.shape[2],
            context,
            window=self.config.sliding_window,
            past_visible_BS=past_visible_BS,
            past_document_B=None if state is None else state.document_B,
            num_past=num_past,
            device=q_BHTP.device,
        )
        distance_TS = distances(q_BHTP.shape[2], num_past, q_BHTP.device)
        mask_BHTS = self._biased(seen_B1TS, distance_TS, q_BHTP)
        context.publish(keys=k_BKTP, values=v_BKTP, mask=mask_BHTS)
        return F.scaled_dot_product_attention(
            q_BHTP,
            k_BKTP,
            v_BKTP,
            attn_mask=mask_BHTS,
            scale=self.scale,
            enable_gqa=self.heads.kv != self.heads.queries,
        )

    def _needs_no_mask(self, q_BHTP: Tensor, context: Context) -> bool:
        """Whether causality, and a window that a kernel knows, say all of a call on new rows."""
        is_plain = (
            context.attention_mask_BT is None
            and context.seq_idx_BT is None
            and context.prefix_lengths_B is None
            and self.config.position != "alibi"
        )
        window = self.config.sliding_window
        if not is_plain or window is None or q_BHTP.shape[2] <= window:
            return is_plain
        # Blocks that read this one need the mask of a window.
        device_type, dtype = q_BHTP.device.type, q_BHTP.dtype
        is_known = attention_backend(device_type, dtype, self.heads.dim, True) != TORCH
        return is_known and context.published is None

    def _biased(self, seen_B1TS: Tensor, distance_TS: Tensor, like: Tensor) -> Tensor:
        if self.config.position != "alibi":
            return seen_B1TS
        return with_alibi(seen_B1TS, distance_TS, alibi_slopes(self.heads.queries, like))

    def _step_mask(self, state: KVCache, q_BKGP: Tensor) -> Tensor | None:
        """What a step's queries see, broadcast over `[B, K, G, S]`; None for every filled slot."""
        seen_BS = state.seen()
        seen_B11S = None if seen_BS is None else seen_BS[:, None, None]
        if self.config.position != "alibi":
            return seen_B11S
        slopes_H = alibi_slopes(self.heads.queries, q_BKGP)
        bias_KGS = -slopes_H.view(self.heads.kv, -1, 1) * state.ages()
        if seen_B11S is None:
            return bias_KGS[None]
        return bias_KGS.masked_fill(~seen_B11S, -torch.inf)

    def _output(self, y_BHTP: Tensor) -> Tensor:
        return self.o_proj(y_BHTP.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    # Under autocast x is narrower than the norm's weight, which torch's kernel does not take.
    return norm(x.to(norm.weight.dtype)).to(x.dtype)  # type: ignore[no-any-return]
