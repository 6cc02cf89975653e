# mypy: ignore-errors
"""One token's attention to a key-value cache, as Triton kernels: all SMs read it, once.

The query heads that share a key-value head are the rows of one tile. Where sequences and heads are
too few for the device, each cache is split and a second kernel puts the parts together, as in
Flash-Decoding (https://pytorch.org/blog/flash-decoding). How far a cache is filled is read from
the device, so that the grid is the same for each token and a CUDA graph can replay it.

Needs triton; plain functions, no autograd, no wait for the device.
Shape suffixes: B batch, H query heads, K key-value heads, G = H / K query heads of a key-value
head (padded to a tile's rows), L slots, N keys of a tile, P head dim (padded), S splits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.triton_launch import let_next_start, may_overlap, wait_for_previous

PROGRAMS = 264  # that together keep an H200's 132 SMs busy reading
MAX_SPLITS = 64
LOG2E = 1.4426950408889634


def decode_attention(
    q_BHP: Tensor,
    k_BKP: Tensor,
    v_BKP: Tensor,
    keys_BKLP: Tensor,
    values_BKLP: Tensor,
    position: Tensor,
    scale: float,
) -> Tensor:
    """Put a token into the caches, attend to it and to all before it; `[B, H, P]`.

    Token p lies in slot p modulo L: a full cache forgets its oldest token.

    Args:
        position: 0-dim int64, tokens given before this one.
    """
    batch, kv_heads, slots, head_dim = keys_BKLP.shape
    heads = q_BHP.shape[1]
    group, pairs = heads // kv_heads, batch * kv_heads
    tile = 32 if head_dim > 128 or pairs < PROGRAMS // 4 else 64
    splits = num_splits(pairs, slots, tile)
    out_BHP = torch.empty_like(q_BHP, memory_format=torch.contiguous_format)
    part_BHSP = out_BHP
    stats_2BHS = out_BHP
    if splits > 1:
        part_BHSP = q_BHP.new_empty((batch, heads, splits, head_dim), dtype=torch.float32)
        stats_2BHS = q_BHP.new_empty((2, batch, heads, splits), dtype=torch.float32)
    dims = max(16, triton.next_power_of_2(head_dim))
    overlap = may_overlap(q_BHP)
    launch = {"launch_pdl": True} if overlap else {}
    decode_kernel[(splits, kv_heads, batch)](
        *(q_BHP.contiguous(), k_BKP.contiguous(), v_BKP.contiguous(), keys_BKLP, values_BKLP),
        *(position, part_BHSP, stats_2BHS, scale * LOG2E, slots, batch * heads * splits),
        *(group, head_dim, splits, max(16, triton.next_power_of_2(group)), tile, dims, overlap),
        num_warps=2 if tile == 32 else 4,
        num_stages=3,
        **launch,
    )
    if splits > 1:
        padded = triton.next_power_of_2(splits)
        combine_kernel[(batch * heads,)](
            *(part_BHSP, stats_2BHS, out_BHP, batch * heads * splits),
            *(head_dim, splits, padded, dims, overlap),
            num_warps=4,
            **launch,
        )
    return out_BHP


def num_splits(pairs: int, slots: int, tile: int) -> int:
    """Into how many parts a cache is split.

    Args:
        pairs: of a sequence and a key-value head.
        tile: keys that a program takes at once.
    """
    return max(1, min(round(PROGRAMS / pairs), triton.cdiv(slots, tile), MAX_SPLITS))


@triton.jit
def decode_kernel(
    q, k, v, keys, values, position, out, stats, scale, slots, all_splits,
    G_SIZE: tl.constexpr, P_SIZE: tl.constexpr, SPLITS: tl.constexpr,
    G: tl.constexpr, N: tl.constexpr, P: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    split = tl.program_id(0)
    pair = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    length = tl.load(position)
    slot = (length % slots).to(tl.int32)
    filled = tl.minimum(length, slots).to(tl.int32)
    g, p, n = tl.arange(0, G), tl.arange(0, P), tl.arange(0, N)
    real_P = p < P_SIZE
    row_G = pair * G_SIZE + g
    real_GP = (g < G_SIZE)[:, None] & real_P[None, :]
    q_GP = tl.load(q + row_G[:, None] * P_SIZE + p[None, :], mask=real_GP, other=0.0)
    # Finite, so that a tile of which nothing is seen adds nothing; the first split sees the token.
    high_G = tl.full((G,), -1e30, tl.float32)
    sum_G = tl.zeros((G,), tl.float32)
    acc_GP = tl.zeros((G, P), tl.float32)
    cache = pair * slots * P_SIZE
    if split == 0:
        k_P = tl.load(k + pair * P_SIZE + p, mask=real_P, other=0.0)
        v_P = tl.load(v + pair * P_SIZE + p, mask=real_P, other=0.0)
        tl.store(keys + cache + slot * P_SIZE + p, k_P, mask=real_P)
        tl.store(values + cache + slot * P_SIZE + p, v_P, mask=real_P)
        high_G = tl.sum(q_GP.to(tl.float32) * k_P.to(tl.float32)[None, :], 1) * scale
        sum_G += 1.0
        acc_GP += v_P.to(tl.float32)[None, :]
    share = tl.cdiv(tl.cdiv(filled, N), SPLITS) * N
    first = split * share
    last = tl.minimum(first + share, filled)
    for start in range(first, last, N):
        # The new token's slot is read by none: it may be written at this moment.
        seen_N = (start + n < last) & (start + n != slot)
        at_NP = cache + (start + n)[:, None] * P_SIZE + p[None, :]
        seen_NP = seen_N[:, None] & real_P[None, :]
        k_NP = tl.load(keys + at_NP, mask=seen_NP, other=0.0)
        v_NP = tl.load(values + at_NP, mask=seen_NP, other=0.0)
        score_GN = tl.dot(q_GP, tl.trans(k_NP)) * scale
        score_GN = tl.where(seen_N[None, :], score_GN, -float("inf"))
        new_G = tl.maximum(high_G, tl.max(score_GN, 1))
        weight_GN = tl.exp2(score_GN - new_G[:, None])
        shrink_G = tl.exp2(high_G - new_G)
        sum_G = sum_G * shrink_G + tl.sum(weight_GN, 1)
        acc_GP = acc_GP * shrink_G[:, None] + tl.dot(weight_GN.to(v_NP.dtype), v_NP)
        high_G = new_G
    if SPLITS == 1:
        at_GP = row_G[:, None] * P_SIZE + p[None, :]
        tl.store(out + at_GP, acc_GP / sum_G[:, None], mask=real_GP)
    else:
        part_G = row_G * SPLITS + split
        tl.store(out + part_G[:, None] * P_SIZE + p[None, :], acc_GP, mask=real_GP)
        tl.store(stats + part_G, high_G, mask=g < G_SIZE)
        tl.store(stats + all_splits + part_G, sum_G, mask=g < G_SIZE)


@triton.jit
def combine_kernel(
    part, stats, out, all_splits,
    P_SIZE: tl.constexpr, SPLITS: tl.constexpr, S: tl.constexpr, P: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    s, p = tl.arange(0, S), tl.arange(0, P)
    real_S, real_P = s < SPLITS, p < P_SIZE
    at_S = row * SPLITS + s
    high_S = tl.load(stats + at_S, mask=real_S, other=-1e30)
    sum_S = tl.load(stats + all_splits + at_S, mask=real_S, other=0.0)
    weight_S = tl.exp2(high_S - tl.max(high_S, 0))
    real_SP = real_S[:, None] & real_P[None, :]
    part_SP = tl.load(part + at_S[:, None] * P_SIZE + p[None, :], mask=real_SP, other=0.0)
    y_P = tl.sum(part_SP * weight_S[:, None], 0) / tl.sum(sum_S * weight_S, 0)
    tl.store(out + row * P_SIZE + p, y_P, mask=real_P)
