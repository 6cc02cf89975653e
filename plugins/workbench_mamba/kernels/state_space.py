"""Mamba-2's scan on a CUDA device: own Triton kernels or mamba-ssm's, else torch.

Shape suffixes: B batch, L length, H heads, P head dim, G groups, N state.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from workbench.kernels import TORCH, Backend, Operation, choose
from workbench_mamba.scan import ssd as torch_ssd

HALF = (torch.float16, torch.bfloat16)
# What the own kernels were written for (`workbench_mamba.scan.triton_ssd`).
TRITON_HEAD_DIMS = (16, 32, 64, 128)
TRITON_STATE_DIMS = (16, 32, 64, 128, 256)
PROBE_TOLERANCE = 0.03


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
    from workbench_mamba.kernels.state_space_operators import ssd_forward

    tensors = (x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, initial_state_BHPN)
    needs_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )
    y_BLHP, state_BHPN, _ = ssd_forward(*tensors, seq_idx_BL, backend, needs_grad)
    return y_BLHP, state_BHPN


def _probe_triton() -> None:
    """Run the kernels, and hold outputs and gradients against torch's."""
    from workbench_mamba.kernels.state_space_operators import ssd_forward

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
    found, _, _ = ssd_forward(*ours, None, None, "triton", True)
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
    home=__name__,
)
