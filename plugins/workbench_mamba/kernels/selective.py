"""Mamba's selective scan on a CUDA device: own Triton kernels or mamba-ssm's, else torch.

Shape suffixes: B batch, L length, D channels, N state.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.kernels import TORCH, Backend, Operation, choose
from workbench_mamba.common import upcast
from workbench_mamba.scan import selective_scan as torch_selective_scan

# A copy that travels with an exported model has operators of its own.
NAMESPACE = __name__.replace(".", "_")
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
    tensors = (u_BLD, delta_BLD, A_DN, B_BLN, C_BLN, D_D, delta_bias_D, initial_state_BDN)
    needs_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )
    y_BLD, state_BDN, _ = _forward(*tensors, seq_idx_BL, delta_softplus, backend, needs_grad)
    return y_BLD, state_BDN


@torch.library.custom_op(f"{NAMESPACE}::selective_scan_forward", mutates_args=())
def _forward(
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor | None,
    delta_bias_D: Tensor | None,
    initial_state_BDN: Tensor | None,
    seq_idx_BL: Tensor | None,
    softplus: bool,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`y_BLD`, the final state, and what the backward pass wants to find again."""
    tensors = (u_BLD, delta_BLD, A_DN, B_BLN, C_BLN, D_D, delta_bias_D)
    implementation = _implementation(backend)
    return implementation.forward(*tensors, initial_state_BDN, seq_idx_BL, softplus, save)  # type: ignore[no-any-return]


@_forward.register_fake
def _(
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor | None,
    delta_bias_D: Tensor | None,
    initial_state_BDN: Tensor | None,
    seq_idx_BL: Tensor | None,
    softplus: bool,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    state_BDN = u_BLD.new_empty((u_BLD.shape[0], *A_DN.shape), dtype=torch.float32)
    saved = _implementation(backend).saved_like(u_BLD, A_DN, save)
    return u_BLD.new_empty(u_BLD.shape), state_BDN, saved


@torch.library.custom_op(f"{NAMESPACE}::selective_scan_backward", mutates_args=())
def _backward(
    dy_BLD: Tensor,
    dstate_BDN: Tensor | None,
    saved: Tensor,
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor | None,
    delta_bias_D: Tensor | None,
    initial_state_BDN: Tensor | None,
    seq_idx_BL: Tensor | None,
    softplus: bool,
    backend: str,
) -> list[Tensor]:
    """Gradients of the tensors in order; empty for what was None."""
    tensors = (u_BLD, delta_BLD, A_DN, B_BLN, C_BLN, D_D, delta_bias_D)
    gradients = _implementation(backend).backward(
        dy_BLD, dstate_BDN, saved, *tensors, initial_state_BDN, seq_idx_BL, softplus
    )
    return [u_BLD.new_empty(0) if gradient is None else gradient for gradient in gradients]


@_backward.register_fake
def _(
    dy_BLD: Tensor,
    dstate_BDN: Tensor | None,
    saved: Tensor,
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor | None,
    delta_bias_D: Tensor | None,
    initial_state_BDN: Tensor | None,
    seq_idx_BL: Tensor | None,
    softplus: bool,
    backend: str,
) -> list[Tensor]:
    inputs = (u_BLD, delta_BLD, A_DN, B_BLN, C_BLN, D_D, delta_bias_D, initial_state_BDN)
    return [
        u_BLD.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)
        for tensor in inputs
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, softplus, backend, _ = inputs
    ctx.save_for_backward(output[2], *tensors)
    ctx.softplus, ctx.backend = softplus, backend
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy_BLD: Tensor | None, dstate: Tensor | None, _: Any) -> tuple[Any, ...]:
    saved, *tensors = ctx.saved_tensors
    if dy_BLD is None:
        dy_BLD = torch.zeros_like(tensors[0])
    found = _backward(dy_BLD, dstate, saved, *tensors, ctx.softplus, ctx.backend)
    given = [None if tensor is None else grad for tensor, grad in zip(tensors, found, strict=False)]
    return (*given, None, None, None, None)


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _implementation(backend: str) -> Any:
    """The class with static `forward`, `backward` and `saved_like` of a backend."""
    if backend == "mamba-ssm":
        return _MambaSSM
    from workbench_mamba.kernels.triton_selective import Triton

    return Triton


class _MambaSSM:
    """mamba-ssm's CUDA kernel, which wants the length last."""

    @staticmethod
    def forward(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        bias: Tensor | None,
        initial: Tensor | None,
        seq_idx: Tensor | None,
        softplus: bool,
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        library = import_module("selective_scan_cuda")
        y, states, *_ = library.fwd(
            *_length_last(u, delta), A, *_grouped(B, C), D, None, bias, softplus
        )
        final = states[:, :, -1, 1::2].contiguous()
        return y.transpose(1, 2).contiguous(), final, states if save else u.new_empty(0)

    @staticmethod
    def backward(
        dy: Tensor,
        dfinal: Tensor | None,
        states: Tensor,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        bias: Tensor | None,
        initial: Tensor | None,
        seq_idx: Tensor | None,
        softplus: bool,
    ) -> tuple[Tensor | None, ...]:
        if dfinal is not None:
            raise NotImplementedError("mamba-ssm's scan has no gradient of its final state")
        library = import_module("selective_scan_cuda")
        du, ddelta, dA, dB, dC, dD, dbias, *_ = library.bwd(
            *_length_last(u, delta),
            *(A, *_grouped(B, C), D, None, bias),
            *(_length_last(dy)[0], states, None, None, softplus, False),
        )
        du, ddelta = (gradient.transpose(1, 2).contiguous() for gradient in (du, ddelta))
        dB, dC = (gradient.squeeze(1).transpose(1, 2).contiguous() for gradient in (dB, dC))
        return (
            *(du, ddelta, dA, dB.to(B.dtype), dC.to(C.dtype)),
            *(None if D is None else dD, None if bias is None else dbias, None),
        )

    @staticmethod
    def saved_like(u: Tensor, A: Tensor, save: bool) -> Tensor:
        if not save:
            return u.new_empty(0)
        batch, length, channels = u.shape
        shape = (batch, channels, -(-length // 2048), 2 * A.shape[1])
        return u.new_empty(shape, dtype=torch.float32)


def _length_last(*tensors_BLD: Tensor) -> list[Tensor]:
    return [tensor.transpose(1, 2).contiguous() for tensor in tensors_BLD]


def _grouped(*tensors_BLN: Tensor) -> list[Tensor]:
    return [tensor.transpose(1, 2).contiguous().unsqueeze(1) for tensor in tensors_BLN]


def _probe_triton() -> None:
    """Run the kernels, and hold outputs and gradients against torch's.

    The reduction over channels counts on how Triton lays out a tile: another release could break
    it without an error.
    """
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> Tensor:
        values = torch.randn(shape, device="cuda", generator=generator)
        return values.bfloat16().float().requires_grad_()

    u, raw, B, C = random(2, 70, 40), random(2, 70, 40), random(2, 70, 16), random(2, 70, 16)
    A = -torch.rand(40, 16, device="cuda", generator=generator).add(0.5)
    tensors = [u, raw, A.requires_grad_(), B, C, random(40), random(40)]
    ours = [t.to(torch.bfloat16) if t.ndim == 3 else t for t in tensors]
    wanted, _ = torch_selective_scan(u, F.softplus(raw + tensors[6]), *tensors[2:6])
    found, _, _ = _forward(*ours, None, None, True, "triton", True)
    weights = torch.randn(wanted.shape, device="cuda", generator=generator)
    pairs = [(found.float(), wanted)]
    gradients = (torch.autograd.grad((y * weights).sum(), tensors) for y in pairs[0])
    pairs += zip(*gradients, strict=True)
    for one, other in pairs:
        error = float((one - other).detach().norm() / other.detach().norm())
        if not error < PROBE_TOLERANCE:
            raise RuntimeError(f"the kernels are off by {error:.1%} of torch's result")


def _probe_mamba_ssm() -> None:
    u = torch.zeros(1, 8, 16, device="cuda", dtype=torch.bfloat16)
    projection = torch.zeros(1, 8, 8, device="cuda", dtype=torch.bfloat16)
    A = -torch.ones(16, 8, device="cuda")
    arguments = (u, u, A, projection, projection, None, None, None, None, True, False)
    _implementation("mamba-ssm").forward(*arguments)


SELECTIVE_SCAN = Operation(
    "selective_scan",
    [
        Backend(
            name="mamba-ssm",
            probe=_probe_mamba_ssm,
            install="pip install --no-build-isolation --no-deps mamba-ssm causal-conv1d einops",
        ),
        Backend(name="triton", probe=_probe_triton, install="pip install triton"),
    ],
)
