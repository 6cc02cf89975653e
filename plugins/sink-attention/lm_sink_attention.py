"""Sliding-window attention that keeps its first tokens, the sinks, too (arXiv:2309.17453).

A query sees the last `window` tokens of its document, itself included, and the document's first
`num_sinks` tokens. Softmax must put its weight somewhere, models put it on the first tokens, and
plain windows that drop them collapse; with them, text of any length is read in bounded memory.

A sequence is taken in by blocks of `window` tokens, each attending to what is kept of the tokens
before it and to itself: time and memory are linear in its length, in training too.

Shape suffixes: B batch, T tokens in this call, C tokens of a block, D d_model, H query heads,
K key-value heads, G = H / K query heads a key-value head, P head dim, S sinks, W window,
L = S + W slots, N = L + C keys of a block.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from workbench.config import Choice, Range
from workbench.costs import Costs
from workbench.errors import FieldError
from workbench.hookspecs import Register, hookimpl
from workbench.layer import PLAIN, Context, Layer, State
from workbench_attention.config import AttentionConfig, Heads


@dataclasses.dataclass
class Slots(State):
    """The keys and values that later tokens may see.

    Attributes:
        keys_BKLP, values_BKLP: token r of a document is in slot r if it is a sink, else in the
            ring of the W slots after the sinks; keys are turned by their position r.
        count_B: int64, real tokens of the row's document so far; slots beyond it are free.
    """

    keys_BKLP: Tensor
    values_BKLP: Tensor
    count_B: Tensor


@dataclasses.dataclass(frozen=True)
class Places:
    """Where tokens lie, each tensor `[B, N]`.

    Attributes:
        real: False for padding and free slots.
        document: 0 is the state's, or the first of a row without a state.
        position: how many real tokens of the document come before.
    """

    real: Tensor
    document: Tensor
    position: Tensor

    def before(self, later: Places) -> Places:
        """These tokens, then later ones."""
        return Places(
            torch.cat((self.real, later.real), -1),
            torch.cat((self.document, later.document), -1),
            torch.cat((self.position, later.position), -1),
        )

    def block(self, start: int, size: int) -> Places:
        """`size` tokens from `start` on."""
        part = slice(start, start + size)
        return Places(self.real[:, part], self.document[:, part], self.position[:, part])


class SinkAttention(Layer):
    """Grouped-query attention to a window and to the document's first tokens, with RoPE.

    Positions count the real tokens of a document, so padding and packing change nothing. Its state
    is bounded, hence the kind: policies offer it where they offer Mamba, and
    `Context.prefix_lengths_B` is no concern of it, as of no recurrent layer.
    """

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        num_heads: Annotated[int | None, Choice(2, 4, 8, 16), "Query heads; null: by head_dim"] = (
            None
        )
        num_kv_heads: Annotated[int | None, Choice(1, 2, 4), "Key-value heads; null: num_heads"] = (
            None
        )
        head_dim: Annotated[int | None, Choice(32, 64, 128), "Channels a head; null: 64"] = None
        num_sinks: Annotated[int, Choice(0, 1, 4), "First tokens that stay visible"] = 4
        window: Annotated[int, Choice(64, 128, 256, 512), "Last tokens seen, itself included"] = 256
        position: Annotated[
            Literal["cache", "text"], "Where a sink lies for a far query: in the cache or the text"
        ] = "cache"
        rope_theta: Annotated[float, Range(1e4, 1e6, log=True), "Base of RoPE's frequencies"] = (
            10000.0
        )
        sink_logits: Annotated[
            bool, Choice(False, True), "A learned score a head that takes weight and gives nothing"
        ] = False

    kind = "recurrent"
    glyph = "S"
    reference = "StreamingLLM, arXiv:2309.17453; sink logits: transformers GptOssAttention"
    output_projection = "o_proj"

    def __init__(self, d_model: int, config: Config, **factory: Any) -> None:
        super().__init__(d_model, config)
        self.heads = heads_of(d_model, config)
        width, kv_width = self.heads.queries * self.heads.dim, self.heads.kv * self.heads.dim
        self.q_proj = nn.Linear(d_model, width, bias=False, **factory)
        self.k_proj = nn.Linear(d_model, kv_width, bias=False, **factory)
        self.v_proj = nn.Linear(d_model, kv_width, bias=False, **factory)
        self.o_proj = nn.Linear(width, d_model, bias=False, **factory)
        if config.sink_logits:
            self.sinks = nn.Parameter(torch.empty(self.heads.queries, **factory))

    @classmethod
    def check(cls, d_model: int, config: Config) -> None:
        heads = heads_of(d_model, config)
        if heads.dim % 2:
            raise FieldError("head_dim", f"RoPE turns pairs of channels: {heads.dim} must be even")
        for field, low in (("num_sinks", 0), ("window", 1)):
            if getattr(config, field) < low:
                raise FieldError(field, f"must be at least {low}, got {getattr(config, field)}")
        if config.rope_theta <= 0:
            raise FieldError("rope_theta", f"must be above 0, got {config.rope_theta}")

    @classmethod
    def costs(
        cls, d_model: int, config: Config, *, length: int, bytes_per_element: int = 4
    ) -> Costs:
        """See `Layer`; every key of a block and every slot counts, whatever the mask hides."""
        heads = heads_of(d_model, config)
        width, kv_width = heads.queries * heads.dim, heads.kv * heads.dim
        weights, slots = 2 * d_model * (width + kv_width), config.num_sinks + config.window
        blocks, rest = divmod(length, config.window)
        pairs = blocks * config.window**2 + rest**2 + max(0, length - config.window) * slots
        slot_bytes, count_bytes = 2 * kv_width * bytes_per_element, torch.int64.itemsize
        return Costs(
            parameters=weights + heads.queries * config.sink_logits,
            forward_flops=2 * weights * length + 4 * width * pairs,
            decode_flops=2 * weights + 4 * width * slots,
            state_bytes=slot_bytes * slots + count_bytes,
            decode_state_bytes=slot_bytes * (slots + 1) + 2 * count_bytes,
        )

    def reset_parameters(self) -> None:
        if self.config.sink_logits:
            nn.init.normal_(self.sinks, std=0.02)

    def init_state(self, batch_size: int, max_length: int, **factory: Any) -> Slots:
        """Empty slots, all of them: their number does not depend on `max_length`."""
        slots = self.config.num_sinks + self.config.window
        shape = (batch_size, self.heads.kv, slots, self.heads.dim)
        return Slots(
            keys_BKLP=torch.zeros(shape, **factory),
            values_BKLP=torch.zeros(shape, **factory),
            count_B=torch.zeros(batch_size, dtype=torch.int64, device=factory.get("device")),
        )

    def forward(
        self, x_BTD: Tensor, context: Context = PLAIN, state: Slots | None = None
    ) -> Tensor:
        q_BTHP, k_BTKP, v_BKTP = self._project(x_BTD)
        places = _places(x_BTD, context, state)
        near_BKGTP, far_BKGTP = self._queries(q_BTHP, places.position)
        k_BKTP = self._turn(k_BTKP, places.position).transpose(1, 2)
        past, document_B1 = state, torch.zeros_like(places.document[:, :1])
        outputs, length, window = [], x_BTD.shape[1], self.config.window
        for start in range(0, length, window):
            size = min(window, length - start)
            here = places.block(start, size)
            k_BKCP, v_BKCP = k_BKTP.narrow(2, start, size), v_BKTP.narrow(2, start, size)
            queries = near_BKGTP.narrow(3, start, size), far_BKGTP.narrow(3, start, size)
            outputs.append(self._attend(queries, k_BKCP, v_BKCP, here, past, document_B1))
            if state is not None or start + size < length:
                past = past or self.init_state(
                    len(x_BTD), 0, device=x_BTD.device, dtype=x_BTD.dtype
                )
                past = _taken_in(past, document_B1, k_BKCP, v_BKCP, here, self.config.num_sinks)
                document_B1 = here.document[:, -1:]
        if state is not None and past is not None:
            for name, tensor in state.tensors().items():
                tensor.copy_(getattr(past, name).detach())
        y_BKGTP = torch.cat(outputs, dim=3)
        return self.o_proj(y_BKGTP.flatten(1, 2).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _attend(
        self,
        queries: tuple[Tensor, Tensor],
        k_BKCP: Tensor,
        v_BKCP: Tensor,
        here: Places,
        past: Slots | None,
        document_B1: Tensor,
    ) -> Tensor:
        """Attention `[B, K, G, C, P]` of a block to what is kept of `document_B1`, and to itself.

        Args:
            queries: as the window meets them and as the sinks do, `[B, K, G, C, P]`; both are the
                same for a sink of this block, which is not longer than the window.
        """
        near_BKGCP, far_BKGCP = queries
        keys, k_BK1NP, v_BK1NP = here, k_BKCP[:, :, None], v_BKCP[:, :, None]
        num_sinks = 0 if past is None else self.config.num_sinks
        if past is not None:
            keys = _held(past, document_B1, num_sinks).before(here)
            k_BK1NP = torch.cat((past.keys_BKLP[:, :, None].to(k_BKCP.dtype), k_BK1NP), dim=3)
            v_BK1NP = torch.cat((past.values_BKLP[:, :, None].to(v_BKCP.dtype), v_BK1NP), dim=3)
        scores_BKGCN = near_BKGCP @ k_BK1NP[..., num_sinks:, :].mT
        if num_sinks:
            far_BKGCS = far_BKGCP @ k_BK1NP[..., :num_sinks, :].mT
            scores_BKGCN = torch.cat((far_BKGCS, scores_BKGCN), dim=-1)
        seen_B11CN = self._sees(here, keys)[:, None, None]
        return self._softmax(scores_BKGCN, seen_B11CN) @ v_BK1NP

    def step(self, x_BD: Tensor, state: Slots, context: Context = PLAIN) -> Tensor:
        num_sinks = self.config.num_sinks
        q_B1HP, k_B1KP, v_BK1P = self._project(x_BD[:, None])
        position_B1 = state.count_B[:, None]
        slot_BK1P = _slot(position_B1, num_sinks, state.keys_BKLP.shape[2])[:, :, None, None]
        slot_BK1P = slot_BK1P.expand_as(v_BK1P)
        k_BK1P = self._turn(k_B1KP, position_B1).transpose(1, 2)
        state.keys_BKLP.scatter_(2, slot_BK1P, k_BK1P.detach().to(state.keys_BKLP.dtype))
        state.values_BKLP.scatter_(2, slot_BK1P, v_BK1P.detach().to(state.values_BKLP.dtype))
        near_BKG1P, far_BKG1P = self._queries(q_B1HP, position_B1)
        state.count_B += 1
        k_BK1LP = state.keys_BKLP[:, :, None].to(near_BKG1P.dtype)
        parts = (
            far_BKG1P @ k_BK1LP[..., :num_sinks, :].mT,
            near_BKG1P @ k_BK1LP[..., num_sinks:, :].mT,
        )
        filled_BL = _held(state, position_B1, num_sinks).real
        weights_BKG1L = self._softmax(torch.cat(parts, -1), filled_BL[:, None, None, None])
        y_BKG1P = weights_BKG1L @ state.values_BKLP[:, :, None].to(weights_BKG1L.dtype)
        return self.o_proj(y_BKG1P.flatten(1))  # type: ignore[no-any-return]

    def _project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, T, H, P]` and keys `[B, T, K, P]`, not turned, and values `[B, K, T, P]`."""
        split = (*x_BTD.shape[:2], -1, self.heads.dim)
        q_BTHP = self.q_proj(x_BTD).view(split) * self.heads.dim**-0.5
        v_BKTP = self.v_proj(x_BTD).view(split).transpose(1, 2)
        return q_BTHP, self.k_proj(x_BTD).view(split), v_BKTP

    def _queries(self, q_BTHP: Tensor, position_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Queries `[B, K, G, T, P]` as the window meets them, and as the sinks do.

        A sink stands right before the window, as in StreamingLLM's cache: no distance is ever
        longer than the state.
        """

        def turned(position_BT: Tensor) -> Tensor:
            q_BHTP = self._turn(q_BTHP, position_BT).transpose(1, 2)
            return q_BHTP.reshape(q_BHTP.shape[0], self.heads.kv, -1, *q_BHTP.shape[2:])

        near_BKGTP = turned(position_BT)
        if self.config.position == "text" or self.config.num_sinks == 0:
            return near_BKGTP, near_BKGTP
        last = self.config.num_sinks + self.config.window - 1
        return near_BKGTP, turned(position_BT.clamp(max=last))

    def _turn(self, x_BTHP: Tensor, position_BT: Tensor) -> Tensor:
        """RoPE (arXiv:2104.09864), channel i with channel i + P/2 as in Llama."""
        # A position times a frequency in bfloat16 would be wrong by whole turns.
        wide = torch.promote_types(x_BTHP.dtype, torch.float32)
        dim = self.heads.dim
        steps = torch.arange(0, dim, 2, device=x_BTHP.device, dtype=wide)
        angles_BT1P = position_BT[..., None, None] * self.config.rope_theta ** (-steps / dim)
        cos, sin = angles_BT1P.cos(), angles_BT1P.sin()
        low, high = x_BTHP.to(wide).chunk(2, dim=-1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1).to(x_BTHP.dtype)

    def _sees(self, queries: Places, keys: Places) -> Tensor:
        """True where a query may see a key, `[B, C, N]`.

        Each sees itself, padding too: a softmax over nothing would be NaN.
        """
        distance_BCN = queries.position[:, :, None] - keys.position[:, None]
        in_window_BCN = (distance_BCN >= 0) & (distance_BCN < self.config.window)
        is_sink_B1N = keys.position[:, None] < self.config.num_sinks
        seen_BCN = in_window_BCN | (is_sink_B1N & (distance_BCN >= 0))
        seen_BCN &= keys.real[:, None] & (queries.document[:, :, None] == keys.document[:, None])
        length, num_keys = seen_BCN.shape[1:]
        key_N = torch.arange(num_keys, device=seen_BCN.device)
        itself_CN = key_N[num_keys - length :, None] == key_N
        both: Tensor = seen_BCN | itself_CN
        return both

    def _softmax(self, scores_BKGTN: Tensor, seen_B11TN: Tensor) -> Tensor:
        """Weights over the keys seen; with sink logits they add up to less than 1."""
        wide = torch.promote_types(scores_BKGTN.dtype, torch.float32)
        scores = scores_BKGTN.to(wide).masked_fill(~seen_B11TN, -torch.inf)
        if self.config.sink_logits:
            sinks_KG11 = self.sinks.to(wide).view(self.heads.kv, -1, 1, 1)
            sinks = sinks_KG11.expand(*scores.shape[:-1], 1)
            return torch.cat((scores, sinks), -1).softmax(-1)[..., :-1].to(scores_BKGTN.dtype)
        return scores.softmax(-1).to(scores_BKGTN.dtype)


def heads_of(d_model: int, config: SinkAttention.Config) -> Heads:
    """Query heads, key-value heads and their channels, every null worked out.

    Raises:
        FieldError: they do not divide.
    """
    return Heads.of(
        d_model,
        AttentionConfig(
            num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim
        ),
    )


def _places(x_BTD: Tensor, context: Context, state: Slots | None) -> Places:
    """Where the tokens of a call lie."""
    real_BT = context.attention_mask_BT
    if real_BT is None:
        real_BT = torch.ones(x_BTD.shape[:2], dtype=torch.bool, device=x_BTD.device)
    before_BT = real_BT.cumsum(-1) - real_BT.long()
    start_B1 = before_BT[:, :1] if state is None else -state.count_B[:, None]
    if context.seq_idx_BT is None:
        return Places(real_BT, torch.zeros_like(before_BT), before_BT - start_B1)
    document_BT = context.seq_idx_BT.long() - context.seq_idx_BT[:, :1]
    starts_BT = torch.cat((torch.zeros_like(real_BT[:, :1]), document_BT.diff(dim=-1) != 0), -1)
    # `before` never falls, so the latest start is the largest.
    start_BT = torch.where(starts_BT, before_BT, start_B1).cummax(-1).values
    return Places(real_BT, document_BT, before_BT - start_BT)


def _slot(position: Tensor, num_sinks: int, slots: int) -> Tensor:
    """The slot of each of a document's tokens."""
    ring = num_sinks + (position - num_sinks) % (slots - num_sinks)
    return torch.where(position < num_sinks, position, ring)


def _held(state: Slots, document_B1: Tensor, num_sinks: int) -> Places:
    """Where the tokens lie that the slots hold; a free slot's is not real."""
    slots = state.keys_BKLP.shape[2]
    ring = slots - num_sinks
    slot_L = torch.arange(slots, device=state.count_B.device)
    last_B1 = state.count_B[:, None] - 1
    laps_BL = (last_B1 - slot_L).div(ring, rounding_mode="floor").clamp(min=0)
    position_BL = slot_L + ring * laps_BL * (slot_L >= num_sinks)
    return Places(position_BL <= last_B1, document_B1.expand_as(position_BL), position_BL)


def _taken_in(
    past: Slots, document_B1: Tensor, k_BKCP: Tensor, v_BKCP: Tensor, new: Places, num_sinks: int
) -> Slots:
    """The slots after a block: of its last document, the tokens that later ones may see."""
    last_B1 = new.document[:, -1:]
    kept_BC = new.real & (new.document == last_B1)
    count_B = past.count_B * (last_B1 == document_B1)[:, 0] + kept_BC.sum(-1)
    after = dataclasses.replace(past, count_B=count_B)
    held = _held(after, last_B1, num_sinks)
    # Each slot looks for its token among the new ones: several of them may fall on one slot.
    found_BLC = (held.position[:, :, None] == new.position[:, None]) & kept_BC[:, None]
    is_new_B1L1 = (found_BLC.any(-1) & held.real)[:, None, :, None]
    token_B1L1 = found_BLC.int().argmax(-1)[:, None, :, None]

    def put(new_BKCP: Tensor, old_BKLP: Tensor) -> Tensor:
        new_BKLP = new_BKCP.to(old_BKLP.dtype).gather(2, token_B1L1.expand_as(old_BKLP))
        return torch.where(is_new_B1L1, new_BKLP, old_BKLP)

    after.keys_BKLP = put(k_BKCP, past.keys_BKLP)
    after.values_BKLP = put(v_BKCP, past.values_BKLP)
    return after


@hookimpl
def register_layers(register: Register[type[Layer]]) -> None:
    register("sink-attention", SinkAttention)
