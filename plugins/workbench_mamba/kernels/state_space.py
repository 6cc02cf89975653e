"""Mamba-2's scan on a CUDA device: own Triton kernels or mamba-ssm's, else torch.

Shape suffixes: B batch, L length, H heads, P head dim, G groups, N state.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from workbench.kernels import TORCH, Backend, Operation, choose
from workbench_mamba.scan import ssd as torch_ssd

# A copy that travels with an exported model has operators of its own.
NAMESPACE = __name__.replace(".", "_")
HALF = (torch.float16, torch.bfloat16)
# What the own kernels were written for (`workbench_mamba.scan.triton_ssd`).
TRITON_HEAD_DIMS = (16, 32, 64, 128)
TRITON_STATE_DIMS = (16, 32, 64, 128, 256)
PROBE_TOLERANCE = 0.03
MAMBA_SSM_CHUNK = 256  # its fastest on Hopper at the published sizes


def ssd_backend(device_type: str, dtype: torch.dtype, head_dim: int, d_state: int) -> str:
    """What `ssd` runs on, for activations of `dtype`.

    Half precision only: the kernels' matrix products of float32 round to TF32.
    """
    if device_type != "cuda" or dtype not in HALF:
        return TORCH
    fits = head_dim in TRITON_HEAD_DIMS and d_state in TRITON_STATE_DIMS
    return choose("ssd", ("triton", "mamba-ssm") if fits else ("mamba-ssm",))


def ssd(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None = None,
    *,
    chunk_size: int = 64,
    initial_state_BHPN: Tensor | None = None,
    seq_idx_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`workbench_mamba.scan.ssd` on the fastest kernels that work here; `chunk_size` is torch's.

    Returns:
        `y_BLHP` in x's dtype, and the state after the last token in float32.
    """
    backend = ssd_backend(x_BLHP.device.type, x_BLHP.dtype, x_BLHP.shape[3], B_BLGN.shape[3])
    if backend == TORCH:
        return torch_ssd(
            x_BLHP,
            dt_BLH,
            A_H,
            B_BLGN,
            C_BLGN,
            D_H,
            chunk_size=chunk_size,
            initial_state_BHPN=initial_state_BHPN,
            seq_idx_BL=seq_idx_BL,
        )
    tensors = (x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, initial_state_BHPN)
    needs_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )
    y_BLHP, state_BHPN, _ = _forward(*tensors, seq_idx_BL, backend, needs_grad)
    return y_BLHP, state_BHPN


@torch.library.custom_op(f"{NAMESPACE}::ssd_forward", mutates_args=())
def _forward(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None,
    initial_state_BHPN: Tensor | None,
    seq_idx_BL: Tensor | None,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`y_BLHP`, the final state, and what the backward pass wants to find again."""
    arguments = (x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, initial_state_BHPN, seq_idx_BL)
    return _implementation(backend).forward(*arguments, save)  # type: ignore[no-any-return]


@_forward.register_fake
def _(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None,
    initial_state_BHPN: Tensor | None,
    seq_idx_BL: Tensor | None,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, heads, head_dim = x_BLHP.shape
    state = dt_BLH.new_empty((batch, heads, head_dim, B_BLGN.shape[3]))
    saved = _implementation(backend).saved_like(x_BLHP, B_BLGN, save)
    return x_BLHP.new_empty(x_BLHP.shape), state, saved


@torch.library.custom_op(f"{NAMESPACE}::ssd_backward", mutates_args=())
def _backward(
    dy_BLHP: Tensor,
    dstate_BHPN: Tensor | None,
    saved: Tensor,
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None,
    initial_state_BHPN: Tensor | None,
    seq_idx_BL: Tensor | None,
    backend: str,
) -> list[Tensor]:
    """Gradients of x, dt, A, B, C, D and the initial state; empty for what was None."""
    arguments = (x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, initial_state_BHPN, seq_idx_BL)
    gradients = _implementation(backend).backward(dy_BLHP, dstate_BHPN, saved, *arguments)
    return [x_BLHP.new_empty(0) if gradient is None else gradient for gradient in gradients]


@_backward.register_fake
def _(
    dy_BLHP: Tensor,
    dstate_BHPN: Tensor | None,
    saved: Tensor,
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None,
    initial_state_BHPN: Tensor | None,
    seq_idx_BL: Tensor | None,
    backend: str,
) -> list[Tensor]:
    inputs = (x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, initial_state_BHPN)
    return [
        x_BLHP.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)
        for tensor in inputs
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, backend, _ = inputs
    ctx.save_for_backward(output[2], *tensors)
    ctx.backend = backend
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy_BLHP: Tensor | None, dstate: Tensor | None, _: Any) -> tuple[Any, ...]:
    saved, *tensors = ctx.saved_tensors
    if dy_BLHP is None:
        dy_BLHP = torch.zeros_like(tensors[0])
    found = _backward(dy_BLHP, dstate, saved, *tensors, ctx.backend)
    given = [None if tensor is None else grad for tensor, grad in zip(tensors, found, strict=False)]
    return (*given, None, None, None)


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _implementation(backend: str) -> Any:
    """The class with static `forward`, `backward` and `saved_like` of a backend."""
    if backend == "mamba-ssm":
        return _MambaSSM
    from workbench_mamba.kernels.triton_state_space import Triton

    return Triton


class _MambaSSM:
    """mamba-ssm's Triton kernels; the backward pass computes the states again."""

    @staticmethod
    def forward(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        initial: Tensor | None,
        seq_idx: Tensor | None,
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        library = import_module("mamba_ssm.ops.triton.ssd_combined")
        y, _, _, _, _, final = library._mamba_chunk_scan_combined_fwd(
            x, dt, A, B, C, MAMBA_SSM_CHUNK, D=D, initial_states=initial, seq_idx=seq_idx
        )
        return y, final, x.new_empty(0)

    @staticmethod
    def backward(
        dy: Tensor,
        dfinal: Tensor | None,
        saved: Tensor,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        initial: Tensor | None,
        seq_idx: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        library = import_module("mamba_ssm.ops.triton.ssd_combined")
        dx, ddt, dA, dB, dC, dD, _, _, dinitial = library._mamba_chunk_scan_combined_bwd(
            dy,
            *(x, dt, A, B, C, x, MAMBA_SSM_CHUNK),
            D=D,
            initial_states=initial,
            dfinal_states=dfinal,
            seq_idx=seq_idx,
        )
        return dx, ddt, dA, dB, dC, dD, dinitial

    @staticmethod
    def saved_like(x: Tensor, B: Tensor, save: bool) -> Tensor:
        return x.new_empty(0)


def _probe_triton() -> None:
    """Run the kernels, and hold outputs and gradients against torch's."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator).bfloat16().float()

    dt, A = random(2, 150, 4).sigmoid() * 0.2, -random(4).exp()
    tensors = [
        random(2, 150, 4, 64),
        dt,
        A,
        random(2, 150, 2, 64),
        random(2, 150, 2, 64),
        random(4),
    ]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    ours = [t.to(torch.bfloat16) if t.ndim == 4 else t for t in tensors]
    wanted, _ = torch_ssd(*tensors)
    found, _, _ = _forward(*ours, None, None, "triton", True)
    weights = random(*wanted.shape)
    pairs = [(found.float(), wanted)]
    gradients = (torch.autograd.grad((y * weights).sum(), tensors) for y in pairs[0])
    pairs += zip(*gradients, strict=True)
    for one, other in pairs:
        error = float((one - other).detach().norm() / other.detach().norm())
        if not error < PROBE_TOLERANCE:
            raise RuntimeError(f"the kernels are off by {error:.1%} of torch's result")


def _probe_mamba_ssm() -> None:
    # The smallest of its kernels: the whole scan would be tuned for half a minute.
    library = import_module("mamba_ssm.ops.triton.ssd_combined")
    library._chunk_cumsum_fwd(
        torch.zeros(1, 16, 1, device="cuda"), -torch.ones(1, device="cuda"), 16
    )


SSD = Operation(
    "ssd",
    [
        Backend(name="triton", probe=_probe_triton, install="pip install triton"),
        Backend(
            name="mamba-ssm",
            probe=_probe_mamba_ssm,
            install="pip install --no-build-isolation --no-deps mamba-ssm causal-conv1d einops",
        ),
    ],
)
