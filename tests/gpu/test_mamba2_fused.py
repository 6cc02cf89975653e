"""Mamba-2's fused path against its torch path, with the same weights on the same device."""

from __future__ import annotations

import pytest
import torch

from workbench.layer import Context
from workbench_mamba import mamba2
from workbench_mamba.mamba2 import Mamba2, Mamba2Config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = (1, 2, 7, 33, 64, 65, 300, 1000)
CONFIGS = (
    {"headdim": 16, "d_state": 16},
    {"headdim": 64, "d_state": 128, "n_groups": 2},
    {"headdim": 32, "d_state": 64, "dt_limit_min": 0.002, "dt_limit_max": 0.05},
    {"headdim": 32, "d_state": 64, "conv_bias": False, "grouped_norm": False, "n_groups": 2},
    {"headdim": 32, "d_state": 64, "bias": True, "d_conv": 3},
)
# RMS of the difference relative to the reference's; float32 runs the kernels without TF32.
TOLERANCE = {torch.float32: 6e-4, torch.bfloat16: 3e-2}


def error(found, wanted):
    found, wanted = found.detach().double(), wanted.detach().double()
    difference = (found - wanted).square().mean().sqrt()
    return float(difference / wanted.square().mean().sqrt().clamp_min(1e-8))


def make(config, dtype):
    torch.manual_seed(0)
    layer = Mamba2(64, Mamba2Config(**config), device="cuda", dtype=dtype)
    for linear in (layer.in_proj, layer.out_proj):
        torch.nn.init.normal_(linear.weight, std=0.2)
    layer.reset_parameters()
    torch.nn.init.uniform_(layer.norm.weight, 0.5, 1.5)
    return layer


def documents(length, packed):
    if not packed:
        return Context()
    ids = (torch.arange(length, device="cuda") // 9)[None].expand(2, length)
    return Context(seq_idx_BT=ids.to(torch.int32).contiguous())


@pytest.fixture
def backend(monkeypatch):
    def choose(name):
        monkeypatch.setattr(mamba2, "ssd_backend", lambda *_: name)

    return choose


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_outputs_and_gradients(backend, config, length, packed, dtype):
    layer, context = make(config, torch.float32), documents(length, packed)
    x_BTD = torch.randn(2, length, 64, device="cuda", requires_grad=True)
    weights = torch.randn(2, length, 64, device="cuda")
    results = {}
    for name in ("torch", "triton"):
        backend(name)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype != torch.float32):
            y_BTD = layer(x_BTD, context)
        gradients = torch.autograd.grad(
            (y_BTD.float() * weights).sum(), [x_BTD, *layer.parameters()]
        )
        results[name] = [y_BTD, *gradients]
    names = ["y", "x", *(name for name, _ in layer.named_parameters())]
    for name, found, wanted in zip(names, results["triton"], results["torch"], strict=True):
        assert found.isfinite().all(), name
        if length == 1 and name in ("dt_bias", "A_log", "D"):
            continue  # of one token the norm cancels what they scale: their gradients are rounding
        # Sums over few tokens of one sign change carry the rounding of every term.
        slack = 1 if name in ("y", "x") else 3
        assert error(found, wanted) < slack * TOLERANCE[dtype], name


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [2, 7, 65, 300])
@pytest.mark.parametrize("config", CONFIGS)
@torch.inference_mode()
def test_prefill_in_two_calls_and_steps(backend, config, length, packed):
    layer, context = make(config, torch.float32), documents(length, packed)
    x_BTD = torch.randn(2, length + 3, 64, device="cuda")
    half = length // 2
    results = {}
    for name in ("torch", "triton"):
        backend(name)
        state = layer.init_state(2, length + 3)
        parts = []
        for rows in (slice(0, half), slice(half, length)):
            ids = context.seq_idx_BT
            if ids is not None:
                ids = ids[:, rows]
                first = context.seq_idx_BT[:, half - 1 : half] if rows.start else 0
                ids = ids - first
            parts.append(layer(x_BTD[:, rows], Context(seq_idx_BT=ids), state))
        steps = [layer.step(x_BTD[:, length + i], state)[:, None] for i in range(3)]
        results[name] = [torch.cat([*parts, *steps], 1), state.conv_BCW, state.ssm_BHPN]
    for found, wanted in zip(results["triton"], results["torch"], strict=True):
        assert error(found, wanted) < TOLERANCE[torch.float32]
