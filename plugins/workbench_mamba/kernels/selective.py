"""Mamba's selective scan on a CUDA device: own Triton kernels, else mamba-ssm's, else torch.

Shape suffixes: B batch, L length, D channels, N state.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.kernels import TORCH, Backend, Operation, choose
from workbench_mamba.common import upcast
from workbench_mamba.scan import selective_scan as torch_selective_scan

# Beyond 16 the own kernels run out of registers, and are slower.
MAX_STATE = {"mamba-ssm": 256, "triton": 16}
PROBE_TOLERANCE = 0.03


def scan_backend(
    device_type: str, dtype: torch.dtype, d_state: int, *, resumes: bool = False
) -> str:
    """What `selective_scan` runs on, for activations of `dtype`.

    Args:
        resumes: whether there is an initial state or a document border, which mamba-ssm's kernel
            does not know.
    """
    if device_type != "cuda" or dtype == torch.float64:
        return TORCH
    able = [name for name, most in MAX_STATE.items() if d_state <= most]
    if resumes and "mamba-ssm" in able:
        able.remove("mamba-ssm")
    return choose("selective_scan", tuple(able))


def selective_scan(
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor | None = None,
    *,
    delta_bias_D: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state_BDN: Tensor | None = None,
    seq_idx_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`workbench_mamba.scan.selective_scan` on the fastest kernels that work here.

    Args:
        delta_bias_D: added to delta, in float32.
        delta_softplus: whether delta still has to go through a softplus, after the bias.
    """
    resumes = initial_state_BDN is not None or seq_idx_BL is not None
    backend = scan_backend(u_BLD.device.type, u_BLD.dtype, A_DN.shape[1], resumes=resumes)
    if backend == TORCH:
        if delta_bias_D is not None:
            delta_BLD = upcast(delta_BLD) + upcast(delta_bias_D)
        return torch_selective_scan(
            u_BLD,
            F.softplus(upcast(delta_BLD)) if delta_softplus else delta_BLD,
            A_DN,
            B_BLN,
            C_BLN,
            D_D,
            initial_state_BDN=initial_state_BDN,
            seq_idx_BL=seq_idx_BL,
        )
    from workbench_mamba.kernels.selective_operators import scan_forward

    tensors = (u_BLD, delta_BLD, A_DN, B_BLN, C_BLN, D_D, delta_bias_D, initial_state_BDN)
    needs_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )
    y_BLD, state_BDN, _ = scan_forward(*tensors, seq_idx_BL, delta_softplus, backend, needs_grad)
    return y_BLD, state_BDN


def _probe_triton() -> None:
    """Run the kernels, and hold outputs and gradients against torch's.

    The reduction over channels counts on how Triton lays out a tile: another release could break
    it without an error.
    """
    from workbench_mamba.kernels.selective_operators import scan_forward

    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> Tensor:
        values = torch.randn(shape, device="cuda", generator=generator)
        return values.bfloat16().float().requires_grad_()

    u, raw, B, C = random(2, 70, 40), random(2, 70, 40), random(2, 70, 16), random(2, 70, 16)
    A = -torch.rand(40, 16, device="cuda", generator=generator).add(0.5)
    tensors = [u, raw, A.requires_grad_(), B, C, random(40), random(40)]
    ours = [t.to(torch.bfloat16) if t.ndim == 3 else t for t in tensors]
    wanted, _ = torch_selective_scan(u, F.softplus(raw + tensors[6]), *tensors[2:6])
    found, _, _ = scan_forward(*ours, None, None, True, "triton", True)
    weights = torch.randn(wanted.shape, device="cuda", generator=generator)
    pairs = [(found.float(), wanted)]
    gradients = (torch.autograd.grad((y * weights).sum(), tensors) for y in pairs[0])
    pairs += zip(*gradients, strict=True)
    for one, other in pairs:
        error = float((one - other).detach().norm() / other.detach().norm())
        if not error < PROBE_TOLERANCE:
            raise RuntimeError(f"the kernels are off by {error:.1%} of torch's result")


def _probe_mamba_ssm() -> None:
    from workbench_mamba.kernels.selective_operators import scan_forward

    u = torch.zeros(1, 8, 16, device="cuda", dtype=torch.bfloat16)
    projection = torch.zeros(1, 8, 8, device="cuda", dtype=torch.bfloat16)
    A = -torch.ones(16, 8, device="cuda")
    absent = (None,) * 4
    scan_forward(u, u, A, projection, projection, *absent, True, "mamba-ssm", False)


SELECTIVE_SCAN = Operation(
    "selective_scan",
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
