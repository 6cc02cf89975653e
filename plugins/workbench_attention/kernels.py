"""Plain causal attention, and its decode step, on the fastest kernels that work here.

Torch's own scaled_dot_product_attention is the fallback; with cuDNN's kernel first it is the
fastest on Hopper, and flash-attn is the one that knows a sliding window.

Shape suffixes: B batch, H query heads, K key-value heads, T tokens, P head dim.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from workbench.kernels import TORCH, Backend, Operation, choose, constant

HALF = (torch.float16, torch.bfloat16)
MAX_STEP_HEAD_DIM, MAX_STEP_GROUP = 256, 64  # of the own decode kernel: its tiles stay on the chip
PROBE_TOLERANCE = 0.02
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@constant
def attention_backend(
    device_type: str, dtype: torch.dtype, head_dim: int, windowed: bool = False
) -> str:
    """What `causal_attention` runs on.

    Args:
        windowed: whether the rows are longer than a sliding window.
    """
    if device_type != "cuda" or dtype not in HALF:
        return TORCH
    able = []
    if not windowed and head_dim % 8 == 0 and head_dim <= 128:
        able.append("cudnn")
    if not flash_attn_lacks(head_dim, dtype):
        able.append("flash-attn")
    return choose("attention", tuple(able))


def causal_attention(
    q_BHTP: Tensor, k_BKTP: Tensor, v_BKTP: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """Attention of every token to itself and those before it; `[B, H, T, P]`.

    Args:
        window: a token sees itself and `window - 1` tokens before it; None for all. One that is
            shorter than the rows needs a backend that knows windows (`attention_backend`).
    """
    length, head_dim = q_BHTP.shape[2:]
    windowed = window is not None and length > window
    backend = attention_backend(q_BHTP.device.type, q_BHTP.dtype, head_dim, windowed)
    if backend == "flash-attn":
        from flash_attn import flash_attn_func  # calling import_module would break the graph

        reach = (window - 1, 0) if windowed and window is not None else (-1, -1)
        y_BTHP = flash_attn_func(
            *(tensor.transpose(1, 2) for tensor in (q_BHTP, k_BKTP, v_BKTP)),
            softmax_scale=scale,
            causal=True,
            window_size=reach,
        )
        return y_BTHP.transpose(1, 2)  # type: ignore[no-any-return]
    assert not windowed, "torch's kernels have no window: a mask must do"
    is_grouped = k_BKTP.shape[1] != q_BHTP.shape[1]
    if backend == TORCH:
        return F.scaled_dot_product_attention(
            q_BHTP, k_BKTP, v_BKTP, is_causal=True, scale=scale, enable_gqa=is_grouped
        )
    with sdpa_kernel(CUDNN_FIRST, set_priority=True):
        return F.scaled_dot_product_attention(
            q_BHTP, k_BKTP, v_BKTP, is_causal=True, scale=scale, enable_gqa=is_grouped
        )


@constant
def step_backend(
    device_type: str, dtype: torch.dtype, head_dim: int, group: int = 1, is_ring: bool = False
) -> str:
    """What a decode step on static caches without masks runs on.

    Args:
        group: query heads of a key-value head.
        is_ring: whether the cache forgets its oldest token (`KVCache`).
    """
    if device_type != "cuda" or dtype not in HALF:
        return TORCH
    able = []
    if head_dim <= MAX_STEP_HEAD_DIM and group <= MAX_STEP_GROUP:
        able.append("triton")
    if not is_ring and not flash_attn_lacks(head_dim, dtype):
        able.append("flash-attn")
    return choose("attention_step", tuple(able))


@lru_cache
def flash_attn_lacks(head_dim: int, dtype: torch.dtype) -> str:
    """Why flash-attn does not take a head dimension here; empty if it does.

    Builds differ in the head dimensions that were compiled: only a call tells.
    """
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        from flash_attn import flash_attn_func

        x_BTHP = torch.zeros(1, 8, 1, head_dim, device="cuda", dtype=dtype)
        flash_attn_func(x_BTHP, x_BTHP, x_BTHP, causal=True)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _probe_cudnn() -> None:
    x_BHTP = torch.zeros(1, 1, 64, 64, device="cuda", dtype=torch.bfloat16)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        F.scaled_dot_product_attention(x_BHTP, x_BHTP, x_BHTP, is_causal=True)


def _probe_flash_attn() -> None:
    if why := flash_attn_lacks(64, torch.bfloat16):
        raise RuntimeError(why)


def _probe_triton_step() -> None:
    """Run the decode kernels, and hold outputs and caches against torch's."""
    from workbench_attention.cached import cached_attention

    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator).bfloat16()

    # One cache that is split and one that is not; half full, full, and forgetting.
    for batch, slots, filled in ((1, 200, 130), (1, 200, 200), (96, 70, 50), (96, 70, 93)):
        q_B1HP, k_B1KP, v_B1KP = (random(batch, 1, heads, 64) for heads in (12, 4, 4))
        caches = random(batch, 4, slots, 64), random(batch, 4, slots, 64)
        wanted = _torch_step(q_B1HP, k_B1KP, v_B1KP, *(t.clone() for t in caches), filled)
        position = torch.tensor(filled, device="cuda")
        found = cached_attention(q_B1HP, k_B1KP, v_B1KP, *caches, position, 0.125, "triton")
        written = all(
            torch.equal(cache[:, :, filled % slots], new.squeeze(1))
            for cache, new in zip(caches, (k_B1KP, v_B1KP), strict=True)
        )
        error = float((found.float() - wanted).norm() / wanted.norm())
        if not written or not error < PROBE_TOLERANCE:
            raise RuntimeError(f"the kernels are off by {error:.1%} of torch's result")


def _torch_step(
    q_B1HP: Tensor, k_B1KP: Tensor, v_B1KP: Tensor, keys: Tensor, values: Tensor, filled: int
) -> Tensor:
    slots = keys.shape[2]
    for cache, new_B1KP in ((keys, k_B1KP), (values, v_B1KP)):
        cache[:, :, filled % slots] = new_B1KP.squeeze(1)
    seen = min(filled + 1, slots)
    y_BH1P = F.scaled_dot_product_attention(
        q_B1HP.transpose(1, 2).float(),
        keys[:, :, :seen].float(),
        values[:, :, :seen].float(),
        scale=0.125,
        enable_gqa=True,
    )
    return y_BH1P.transpose(1, 2)


_FLASH_ATTN = Backend(
    name="flash-attn",
    probe=_probe_flash_attn,
    install="FLASH_ATTN_CUDA_ARCHS=90 pip install --no-build-isolation flash-attn",
)
_CUDNN = Backend(name="cudnn", probe=_probe_cudnn)
ATTENTION = Operation("attention", [_CUDNN, _FLASH_ATTN], home=__name__)
_TRITON_STEP = Backend(name="triton", probe=_probe_triton_step, install="pip install triton")
ATTENTION_STEP = Operation("attention_step", [_TRITON_STEP, _FLASH_ATTN], home=__name__)
