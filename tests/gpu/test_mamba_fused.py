"""Mamba's fused path against its torch path, with the same weights on the same device.

On a CPU some cases run under Triton's interpreter, where there is one:
`TRITON_INTERPRET=1 pytest tests/gpu/test_mamba_fused.py`.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from workbench.layer import Context
from workbench_mamba import mamba
from workbench_mamba.bitlinear_mamba import BitLinearMamba
from workbench_mamba.mamba import Mamba
from workbench_mamba.scan import triton_selective_plan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D_MODEL = 64 if DEVICE == "cuda" else 24
LONGEST = 1000 if DEVICE == "cuda" else 33
LENGTHS = (1, 2, 7, 33, 64, 65, 300, 1000)
CONFIGS = (
    {},
    {"d_state": 8, "conv_bias": False},
    {"expand": 1, "d_conv": 3},
    {"bias": True, "d_conv": 2, "dt_rank": 3},
)
# RMS of the difference relative to the reference's; float32 runs the kernels without TF32.
TOLERANCE = {torch.float32: 6e-4, torch.bfloat16: 3e-2}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cpu" and not INTERPRETED,
        reason="needs a CUDA device (or triton, with TRITON_INTERPRET=1)",
    ),
]


def error(found, wanted):
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def make(config, layer_class=Mamba):
    torch.manual_seed(0)
    layer = layer_class(D_MODEL, layer_class.Config(**config), device=DEVICE)
    for linear in (layer.in_proj, layer.x_proj, layer.out_proj):
        torch.nn.init.normal_(linear.weight, std=0.2)
    layer.reset_parameters()
    torch.nn.init.uniform_(layer.D, 0.5, 1.5)
    return layer


def documents(length, packed):
    if length > LONGEST:
        pytest.skip("too long for the interpreter")
    if not packed:
        return Context()
    ids = (torch.arange(length, device=DEVICE) // 9)[None].expand(2, length)
    return Context(seq_idx_BT=ids.to(torch.int32).contiguous())


def run(layer, x_BTD, context, dtype):
    """Output and the gradients of input and parameters."""
    weights = torch.linspace(-1, 1, x_BTD.numel(), device=DEVICE).view_as(x_BTD)
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=dtype != torch.float32):
        y_BTD = layer(x_BTD, context)
    inputs = [x_BTD, *layer.parameters()]
    return [y_BTD, *torch.autograd.grad((y_BTD.float() * weights).sum(), inputs)]


@pytest.fixture
def backend(monkeypatch):
    """Set what the scan runs on; returns the calls of the fused operator."""
    from workbench_mamba.kernels import mamba_inner

    if DEVICE == "cpu":  # programs are slow to start there
        for name in ("FORWARD_CHANNELS", "BACKWARD_CHANNELS"):
            monkeypatch.setattr(triton_selective_plan, name, 64)
    calls, real = [], mamba_inner.mamba_inner

    def counted(*arguments, **keywords):
        calls.append(keywords)
        return real(*arguments, **keywords)

    monkeypatch.setattr(mamba_inner, "mamba_inner", counted)

    def choose(name):
        monkeypatch.setattr(mamba, "scan_backend", lambda *_, **__: name)
        return calls

    return choose


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_outputs_and_gradients(backend, config, length, packed, dtype):
    layer, context = make(config), documents(length, packed)
    x_BTD = torch.randn(2, length, D_MODEL, device=DEVICE, requires_grad=True)
    calls = backend("torch")
    wanted = run(layer, x_BTD, context, dtype)
    assert not calls
    backend("triton")
    found = run(layer, x_BTD, context, dtype)
    assert len(calls) == 1
    names = ["y", "x", *(name for name, _ in layer.named_parameters())]
    for name, one, other in zip(names, found, wanted, strict=True):
        assert one.isfinite().all(), name
        if not other.any():  # A's, at a first token without a state before it
            assert not one.any(), name
            continue
        # Sums over few tokens of one sign change carry the rounding of every term.
        slack = 1 if name in ("y", "x") else 3
        assert error(one, other) < slack * TOLERANCE[dtype], name


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [2, 7, 65, 300])
@pytest.mark.parametrize("config", CONFIGS)
@torch.inference_mode()
def test_prefill_in_two_calls_and_steps(backend, config, length, packed):
    layer, context = make(config), documents(length, packed)
    x_BTD = torch.randn(2, length + 3, D_MODEL, device=DEVICE)
    half = length // 2
    results = {}
    for name in ("torch", "triton"):
        calls = backend(name)
        state = layer.init_state(2, length + 3)
        parts = []
        for rows in (slice(0, half), slice(half, length)):
            ids = context.seq_idx_BT
            if ids is not None:
                ids = ids[:, rows] - (ids[:, half - 1 : half] if rows.start else 0)
            parts.append(layer(x_BTD[:, rows], Context(seq_idx_BT=ids), state))
        steps = [layer.step(x_BTD[:, length + i], state)[:, None] for i in range(3)]
        results[name] = [torch.cat([*parts, *steps], 1), state.conv_BCW, state.ssm_BCN]
    assert len(calls) == 2
    for found, wanted in zip(results["triton"], results["torch"], strict=True):
        assert error(found, wanted) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("change", ["padding", "state", "hook", "norm", "subclass", "parametrized"])
def test_what_the_operator_cannot_do_runs_without_it(backend, change):
    subclass = change == "subclass"
    layer = make({"dt_bc_norm": change == "norm"}, BitLinearMamba if subclass else Mamba)
    state, context = None, Context()
    if change == "padding":
        context = Context(attention_mask_BT=torch.ones(2, 5, dtype=torch.bool, device=DEVICE))
    if change == "state":
        state = layer.init_state(2, 5)
    if change == "hook":
        layer.x_proj.register_forward_hook(lambda *_: None)
    if change == "parametrized":
        torch.nn.utils.parametrize.register_parametrization(
            layer.dt_proj, "weight", torch.nn.Identity()
        )
    calls = backend("triton")
    layer(torch.randn(2, 5, D_MODEL, device=DEVICE), context, state)
    assert not calls


def test_an_output_projection_that_is_watched_sees_its_input(backend):
    layer = make({})
    x_BTD = torch.randn(2, 7, D_MODEL, device=DEVICE, requires_grad=True)
    backend("torch")
    wanted = run(layer, x_BTD, Context(), torch.float32)
    calls, seen = backend("triton"), []
    layer.out_proj.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    found = run(layer, x_BTD, Context(), torch.float32)
    assert seen == [(2, 7, 2 * D_MODEL)]
    assert calls[0]["out_weight_DC"] is None
    for one, other in zip(found, wanted, strict=True):
        assert error(one, other) < TOLERANCE[torch.float32]
