"""The time mix of RWKV-7 "Goose" as a workbench plugin.

    S_t = diag(w_t) S_{t-1} - (a_t κ_t) (κ_t^T S_{t-1}) + k_t v_t^T        y_t = S_t^T r_t

Each channel of the state decays at a rate of its own (w), the value stored under a unit key κ is
taken out at an in-context learning rate (a), and a new one is put in under k. Peng et al.,
arXiv:2503.14456. Parameters are named and shaped as in the authors' checkpoints
(`blocks.0.att.`), which load as they are.

Shape suffixes: B batch, T tokens, D d_model, H heads of N, K = V = N state rows and columns;
S chunks of Q tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.config import Choice
from workbench.costs import Costs
from workbench.errors import FieldError
from workbench.hookspecs import Register, hookimpl
from workbench.layer import PLAIN, Context, Kind, Layer, State
from workbench.layout import Block
from workbench_mamba.common import (
    STATE_BYTES,
    at_least_float32,
    divisors,
    nearest,
    require_at_least_one,
    upcast,
)
from workbench_mamba.scan.common import documents, without_autocast

# The strongest decay of a token is exp(-exp(-0.5)) = 0.545. Decays of a chunk are factored into two
# powers that float32 must hold, so a chunk has an upper limit.
STRONGEST, LONGEST_CHUNK = math.exp(-0.5), 64
# Factors of sqrt(d_model) in the published ranks, which are rounded to multiples of 32.
RANKS = {"decay": 2.5, "a": 2.5, "v": 1.7, "gate": 5.0}
Rank = Annotated[int | None, Choice(None, 16, 32, 64, 128, 256)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RWKV7Config:
    """Hyper-parameters of RWKV-7's time mix."""

    head_dim: Annotated[int, Choice(16, 32, 64, 128), "Width N of a head"] = 64
    decay_low_rank_dim: Annotated[Rank, "Rank of the decay's projection; null: as published"] = None
    a_low_rank_dim: Annotated[Rank, "Rank of the in-context learning rate's"] = None
    v_low_rank_dim: Annotated[Rank, "Rank of the value residual's"] = None
    gate_low_rank_dim: Annotated[Rank, "Rank of the output gate's"] = None
    value_residual: Annotated[
        bool, Choice(True, False), "Mixes the first RWKV-7 block's value into its own"
    ] = True
    chunk_size: Annotated[int, "Tokens computed as one matrix: speed only, not results"] = 32
    norm_eps: Annotated[float, "Added to the variance in the heads' norm"] = 64e-5
    depth: Annotated[float, "Place in the stack, above 0 to 1, that initial weights are for"] = 0.5

    def rank(self, name: str, d_model: int) -> int:
        """The rank of `"decay"`, `"a"`, `"v"` (0 without the residual) or `"gate"`."""
        if name == "v" and not self.value_residual:
            return 0
        given: int | None = getattr(self, f"{name}_low_rank_dim")
        return given or max(32, round(RANKS[name] * math.sqrt(d_model) / 32) * 32)


@dataclasses.dataclass
class RWKV7State(State):
    """The last token's input, and S, at least in float32."""

    shift_BD: Tensor
    wkv_BHKV: Tensor


class RWKV7(Layer):
    """RWKV-7's time mix.

    The first such block of a layout publishes `value` `[B, T, D]`, which the others that want it
    (`value_residual`) mix into their own. The first one's v0, v1 and v2 have no effect: checkpoints
    hold them all the same.

    Padding may stand on either side of a row; a call that fills a state wants it on the left. With
    `seq_idx` and a state, the state belongs to the first document of the call. `prefix_lengths` has
    no effect.
    """

    Config: ClassVar[type] = RWKV7Config
    kind: ClassVar[Kind] = "recurrent"
    glyph = "R"
    reference = "arXiv:2503.14456; RWKV-LM RWKV_Tmix_x070"
    output_projection = "output"

    def __init__(
        self,
        d_model: int,
        config: RWKV7Config,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, config)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.heads = d_model // config.head_dim

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, **factory))

        for letter in "rwkvag":
            self.register_parameter(f"x_{letter}", parameter(1, 1, d_model))
        for letter, name in (("w", "decay"), ("a", "a"), ("v", "v"), ("g", "gate")):
            if rank := config.rank(name, d_model):
                self.register_parameter(f"{letter}1", parameter(d_model, rank))
                self.register_parameter(f"{letter}2", parameter(rank, d_model))
                if letter != "g":
                    self.register_parameter(f"{letter}0", parameter(1, 1, d_model))
        self.k_k, self.k_a = parameter(1, 1, d_model), parameter(1, 1, d_model)
        self.r_k = parameter(self.heads, config.head_dim)
        self.receptance = nn.Linear(d_model, d_model, bias=False, **factory)
        self.key = nn.Linear(d_model, d_model, bias=False, **factory)
        self.value = nn.Linear(d_model, d_model, bias=False, **factory)
        self.output = nn.Linear(d_model, d_model, bias=False, **factory)
        self.ln_x = nn.GroupNorm(self.heads, d_model, eps=config.norm_eps, **factory)

    @classmethod
    def check(cls, d_model: int, config: RWKV7Config) -> None:
        ranks = (f"{name}_low_rank_dim" for name in RANKS)
        require_at_least_one(config, "chunk_size", *ranks)
        if (size := config.chunk_size) > LONGEST_CHUNK:
            raise FieldError("chunk_size", f"must be at most {LONGEST_CHUNK}, got {size}")
        if config.head_dim < 2 or d_model % config.head_dim:
            works = nearest([n for n in divisors(d_model) if n > 1], max(1, config.head_dim))
            raise FieldError(
                "head_dim",
                f"{config.head_dim} must be above 1 and divide d_model = {d_model}: {works} does",
            )
        if config.norm_eps <= 0:
            raise FieldError("norm_eps", f"must be above 0, got {config.norm_eps}")
        if not 0 < config.depth <= 1:
            raise FieldError("depth", f"must be above 0 and at most 1, got {config.depth}")

    @classmethod
    def source(cls, d_model: int, blocks: Sequence[Block]) -> int | None:
        own = blocks[-1]
        first = next(i for i, block in enumerate(blocks) if block.layer == own.layer)
        return first if own.config["value_residual"] and first < len(blocks) - 1 else None

    @classmethod
    def costs(
        cls, d_model: int, config: RWKV7Config, *, length: int, bytes_per_element: int = 4
    ) -> Costs:
        n, q = config.head_dim, min(config.chunk_size, length)
        ranks = sum(config.rank(name, d_model) for name in RANKS)
        matrices = 4 * d_model**2 + 2 * d_model * ranks
        state = d_model * n
        # Of a channel and chunk: {a, r} with {b, k} (8), what a reads within it (2), sum over its
        # tokens (4); the triangular system; the state read twice and written.
        chunk = 14 * q * q + 2 * q * (q - 1) + 8 * q * n
        core = 9 * state if length == 1 else chunk * d_model * -(-length // q)
        state_bytes = d_model * bytes_per_element + state * max(bytes_per_element, STATE_BYTES)
        return Costs(
            parameters=matrices + d_model * (13 + config.value_residual),
            forward_flops=2 * matrices * length + core,
            decode_flops=2 * matrices + 9 * state,
            state_bytes=state_bytes,
            decode_state_bytes=2 * state_bytes,
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As published for a block at `depth` of the stack; the output starts at zero."""
        width, n, depth = self.d_model, self.config.head_dim, self.config.depth
        channel = torch.arange(width, device=self.k_k.device, dtype=torch.float32)
        linear = channel / (width - 1) - 0.5
        zigzag = 2 * (channel % n) / (n - 1) - 1
        zigzag = zigzag * zigzag.abs()
        mixed = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
        for name, power in mixed.items():
            self.get_parameter(f"x_{name}").copy_(1 - (channel / width) ** (power * (1 - depth)))
        decay = 6 * (linear + 0.5) ** (1 + depth**0.3) - 6
        starts = {"w": decay + 0.5 + 2.5 * zigzag, "a": 0.3 * zigzag + 0.4 * linear - 0.19}
        if self.config.value_residual:
            starts["v"] = 0.73 - 0.4 * linear
        for name, start in starts.items():
            self.get_parameter(f"{name}0").copy_(start)
        self.k_k.copy_(0.71 - 0.1 * linear)
        nn.init.constant_(self.k_a, 1.02)
        for name in (*starts, "g"):
            nn.init.zeros_(self.get_parameter(f"{name}1"))
            _init_orthogonal(self.get_parameter(f"{name}2"), gain=0.1)
        nn.init.constant_(self.r_k, -0.04)
        for linear_layer, scale in ((self.receptance, 0.5), (self.key, 0.05), (self.value, 0.5)):
            nn.init.uniform_(linear_layer.weight, -scale / width**0.5, scale / width**0.5)
        nn.init.zeros_(self.output.weight)
        nn.init.constant_(self.ln_x.weight, depth**0.7)
        nn.init.zeros_(self.ln_x.bias)

    def init_state(
        self,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> RWKV7State:
        """Zeros; its size does not depend on `max_length`."""
        weight, n = self.key.weight, self.config.head_dim
        device = weight.device if device is None else device
        dtype = dtype or weight.dtype
        wkv = (batch_size, self.heads, n, n)
        return RWKV7State(
            torch.zeros(batch_size, self.d_model, device=device, dtype=dtype),
            torch.zeros(wkv, device=device, dtype=at_least_float32(dtype)),
        )

    def forward(
        self, x_BTD: Tensor, context: Context = PLAIN, state: RWKV7State | None = None
    ) -> Tensor:
        x_BTD = context.mask_padding(x_BTD)
        change_BTD = _previous(x_BTD, context, None if state is None else state.shift_BD) - x_BTD
        mixed = {name: x_BTD + change_BTD * getattr(self, f"x_{name}") for name in "rwkvag"}
        gate_BTD = self._low_rank("g", mixed["g"], torch.sigmoid)
        log_w = -STRONGEST * upcast(self._low_rank("w", mixed["w"], torch.tanh)).sigmoid()
        rate_BTD = upcast(self._low_rank("a", mixed["a"])).sigmoid()
        r, v = upcast(self.receptance(mixed["r"])), upcast(self._value(mixed["v"], context))
        key_BTD = upcast(self.key(mixed["k"]))
        k = key_BTD * (1 + (rate_BTD - 1) * upcast(self.k_a))
        kk = F.normalize(self._by_head(key_BTD * upcast(self.k_k)), dim=-1).flatten(-2)
        # Where there is padding, nothing decays, is taken out or put in.
        k, kk, log_w = (context.mask_padding(part) for part in (k, kk, log_w))
        r, log_w, k, v, a, b = map(self._by_head, (r, log_w, k, v, -kk, kk * rate_BTD))
        with without_autocast(x_BTD):
            y_BTHN, wkv_BHKV = rwkv7(
                *(r, log_w, k, v, a, b),
                None if state is None else state.wkv_BHKV,
                chunk_size=self.config.chunk_size,
                seq_idx_BT=context.seq_idx_BT,
            )
        if state is not None:
            state.shift_BD.copy_(x_BTD[:, -1].detach())
            state.wkv_BHKV.copy_(wkv_BHKV.detach())
        bonus_BTHN = (r * k * upcast(self.r_k)).sum(-1, keepdim=True) * v
        y_BTD = (self._normed(y_BTHN) + bonus_BTHN.flatten(2)) * upcast(gate_BTD)
        return self.output(y_BTD.to(x_BTD.dtype))  # type: ignore[no-any-return]

    def _value(self, x_BTD: Tensor, context: Context) -> Tensor:
        """The layer's value, with as much of the first block's as a learned gate says."""
        value_BTD: Tensor = self.value(x_BTD)
        context.publish(value=value_BTD)
        if not self.config.value_residual:
            return value_BTD
        share_BTD = self._low_rank("v", x_BTD).sigmoid()
        first_BTD = value_BTD if context.source is None else context.source["value"]
        assert first_BTD is not None
        return value_BTD + (first_BTD - value_BTD) * share_BTD

    def _low_rank(
        self, name: str, x_BTD: Tensor, between: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        inner = x_BTD @ self.get_parameter(f"{name}1")
        y_BTD = (inner if between is None else between(inner)) @ self.get_parameter(f"{name}2")
        return y_BTD if name == "g" else y_BTD + self.get_parameter(f"{name}0")

    def _by_head(self, x_BTD: Tensor) -> Tensor:
        return torch.unflatten(x_BTD, -1, (self.heads, -1))

    def _normed(self, y_BTHN: Tensor) -> Tensor:
        weight, bias = upcast(self.ln_x.weight), upcast(self.ln_x.bias)
        y = F.group_norm(y_BTHN.flatten(0, 1).flatten(1), self.heads, weight, bias, self.ln_x.eps)
        return torch.unflatten(y, 0, y_BTHN.shape[:2])


def _previous(x_BTD: Tensor, context: Context, last_BD: Tensor | None) -> Tensor:
    """Each token's predecessor in its document, `last_BD` or zeros before the first."""
    first_BD = torch.zeros_like(x_BTD[:, 0]) if last_BD is None else last_BD.to(x_BTD.dtype)
    previous_BTD = torch.cat((first_BD[:, None], x_BTD[:, :-1]), 1)
    if context.seq_idx_BT is None:
        return previous_BTD
    starts_BT = context.seq_idx_BT.diff(dim=1, prepend=context.seq_idx_BT[:, :1]) != 0
    return previous_BTD.masked_fill(starts_BT[..., None], 0.0)


def _init_orthogonal(weight: Tensor, *, gain: float) -> None:
    rows, columns = weight.shape
    # In float32: there is no orthogonalisation in half precision.
    exact = torch.empty_like(weight, dtype=torch.float32)
    weight.copy_(nn.init.orthogonal_(exact, gain=gain * math.sqrt(max(1, rows / columns))))


def rwkv7(
    r_BTHK: Tensor,
    log_w_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    start_BHKV: Tensor | None = None,
    *,
    chunk_size: int = 32,
    seq_idx_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`S_t = diag(exp(log_w)) S_{t-1} + b (a^T S_{t-1}) + k v^T`, `y_t = S_t^T r_t`.

    In a chunk, what each token takes out (`a^T S`) depends on those before it: one triangular
    system gives it all, as a part of its own and a part linear in the chunk's first state.

    Args:
        log_w_BTHK: from -0.607 to 0; chunks of 64 are the longest that float32 then holds.
        start_BHKV: the state before the first token (zero if None). With `seq_idx` it belongs to
            the first document only.
        chunk_size: changes speed and memory, not results.
        seq_idx_BT: integers; the state starts from zero wherever they change along a row.

    Returns:
        Outputs `[B, T, H, V]` and the last state, in the arguments' dtype.
    """
    batch, length, heads, width = k_BTHK.shape
    state = k_BTHK.new_zeros(batch, heads, width, v_BTHV.shape[-1])
    if start_BHKV is not None:
        state = start_BHKV.to(k_BTHK.dtype)
    arguments = (r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK)
    if length == 1:
        return _one_token(state, *arguments)
    size = min(chunk_size, length)
    r, log_w, k, v, a, b = (_chunked(part, size) for part in arguments)  # [S, B, H, Q, K or V]
    mask, at_start, at_end, through = _borders(seq_idx_BT, size, log_w)
    total = log_w.cumsum(-2)
    middle, last = total[..., size // 2, None, :], total[..., -1:, :]
    # From token i to j decays e^{t_j - m} e^{m - t_i}; m in the middle keeps both factors small.
    readers = torch.cat((a * (total - log_w - middle).exp(), r * (total - middle).exp()), -2)
    writers = torch.cat((b, k), -2) * torch.cat((middle - total,) * 2, -2).exp()
    products = (readers @ writers.mT).masked_fill(~mask, 0.0)
    from_a, from_r = products.chunk(2, -2)
    of_start = readers * middle.exp() * at_start
    a_of_start, r_of_start = of_start.chunk(2, -2)
    wanted = torch.cat((from_a[..., size:] @ v, a_of_start), -1)
    system = -from_a[..., :size]
    solved = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    fresh, read = solved.split((v.shape[-1], width), -1)
    kept = (writers * (last - middle).exp() * at_end).mT
    passed = (last.exp() * through).mT
    states, written = [], []
    for s in range(len(k)):
        states.append(state)
        written.append(torch.cat((fresh[s] + read[s] @ state, v[s]), -2))
        state = passed[s] * state + kept[s] @ written[s]
    y = r_of_start @ torch.stack(states) + from_r @ torch.stack(written)
    return y.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length], state


def _one_token(
    state: Tensor, r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """`rwkv7` on `[B, 1, H, N]`, without matrices of tokens."""
    r, log_w, k, v, a, b = (part.transpose(1, 2) for part in (r, log_w, k, v, a, b))
    state = log_w.exp().mT * state + b.mT * (a @ state) + k.mT * v
    return (r @ state).transpose(1, 2), state


def _chunked(x_BTHN: Tensor, size: int) -> Tensor:
    """`[S, B, H, Q, N]`; zeros at the end, which neither decay nor write."""
    x_BTHN = F.pad(x_BTHN, (0, 0, 0, 0, 0, -x_BTHN.shape[1] % size))
    return torch.unflatten(x_BTHN, 1, (-1, size)).permute(1, 0, 3, 2, 4).contiguous()


def _borders(
    seq_idx_BT: Tensor | None, size: int, like: Tensor
) -> tuple[Tensor, Tensor | float, Tensor | float, Tensor | float]:
    """Which of a chunk's (b, k) its (a, r) see `[..., 2Q, 2Q]`; and ones, with zeros where a
    document border lies between a chunk's start and a token, a token and its end, start and end.
    """
    lower = torch.ones(size, size, dtype=torch.bool, device=like.device).tril()
    mask = torch.cat((lower.tril(-1), lower)).repeat(1, 2)
    if seq_idx_BT is None:
        return mask, 1.0, 1.0, 1.0
    document_BT = documents(seq_idx_BT)
    missing = -document_BT.shape[1] % size
    document_BT = torch.cat((document_BT, document_BT[:, -1:].expand(-1, missing)), 1)
    document = torch.unflatten(document_BT, 1, (-1, size)).transpose(0, 1)[:, :, None]
    final = document[..., -1:]
    # The state that enters a chunk belongs to the last document of the chunk before.
    before = torch.cat((torch.zeros_like(final[:1]), final[:-1]))
    twice = torch.cat((document, document), -1)
    same = twice.unsqueeze(-1) == twice.unsqueeze(-2)
    at_start, at_end, through = (
        (one == other).unsqueeze(-1).to(like.dtype)
        for one, other in ((twice, before), (twice, final), (before, final))
    )
    return mask & same, at_start, at_end, through


@hookimpl
def register_layers(register: Register[type[Layer]]) -> None:
    register("rwkv7", RWKV7)
