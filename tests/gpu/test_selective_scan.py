"""The selective scan's Triton kernels against the reference in float64, outputs and gradients.

On a CPU the same cases run under Triton's interpreter, where there is one:
`TRITON_INTERPRET=1 pytest tests/gpu/test_selective_scan.py` (slow, so the long ones are left out).
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from torch.nn.functional import silu, softplus

from tests.plugins.scan_cases import borders, rms_error
from workbench_mamba.scan import selective_scan_ref, triton_selective_plan
from workbench_mamba.scan.triton_selective import (
    selective_scan_backward,
    selective_scan_forward,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LONGEST = 1000 if DEVICE == "cuda" else 40
TOLERANCE = {torch.float32: 6e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}
OPTIONAL = ("D", "delta_bias", "initial_state", "seq_idx")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cpu" and not INTERPRETED,
        reason="needs a CUDA device (or triton, with TRITON_INTERPRET=1)",
    ),
]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Uninitialised memory holds NaN, so that forgetting to write an element shows."""
    if DEVICE == "cpu":  # programs are slow to start there
        monkeypatch.setattr(triton_selective_plan, "CHANNELS", 64)
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(previous)


def make(length, n=16, d=70, dtype=torch.float32, options=OPTIONAL, batch=2):
    """Arguments as a layer has them: u half of one projection, B and C parts of another."""
    if length > LONGEST:
        pytest.skip("too long for the interpreter")
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    xz = normal(batch, length, 2 * d).to(DEVICE, dtype)
    projected = normal(batch, length, 3 + 2 * n).to(DEVICE, dtype)
    arguments = {
        "u": xz[..., :d],
        "delta": (normal(batch, length, d) * 0.5 - 3).to(DEVICE, dtype),
        "A": -torch.rand(d, n, generator=generator).to(DEVICE) * 8,
        "B": projected[..., 3 : 3 + n],
        "C": projected[..., 3 + n :],
        "D": normal(d).to(DEVICE),
        "delta_bias": normal(d).to(DEVICE) * 0.3,
        "initial_state": normal(batch, d, n).to(DEVICE),
        "seq_idx": borders(length).to(DEVICE),
    }
    for name in OPTIONAL:
        if name not in options:
            arguments[name] = None
    weights = normal(batch, length, d).to(DEVICE, dtype), normal(batch, d, n).to(DEVICE)
    return arguments, weights


def expected(arguments, weights, delta_softplus):
    """Outputs and gradients of the reference in float64; the final state's weight may be None."""
    leaves = {
        name: None if value is None else value.detach().double().requires_grad_()
        for name, value in arguments.items()
        if name != "seq_idx"
    }
    delta = leaves["delta"]
    if leaves["delta_bias"] is not None:
        delta = delta + leaves["delta_bias"]
    if delta_softplus:
        delta = softplus(delta)
    y, final = selective_scan_ref(
        *(leaves["u"], delta, leaves["A"], leaves["B"], leaves["C"], leaves["D"]),
        initial_state_BDN=leaves["initial_state"],
        seq_idx_BL=arguments["seq_idx"],
    )
    loss = (y * weights[0].double()).sum()
    if weights[1] is not None:
        loss = loss + (final * weights[1].double()).sum()
    loss.backward()
    return (y, final), {name: leaf.grad for name, leaf in leaves.items() if leaf is not None}


def found(arguments, weights, delta_softplus, segments=None):
    inputs = tuple(arguments.values())
    options = {"delta_softplus": delta_softplus, "segments": segments}
    y, gated, final, checkpoints = selective_scan_forward(*inputs, save=True, **options)
    assert gated is None
    plain = selective_scan_forward(*inputs, save=False, **options)
    assert torch.equal(plain.y_BLD, y)
    assert torch.equal(plain.final_BDN, final)
    assert plain.checkpoints.numel() == 0
    gradients = selective_scan_backward(*weights, checkpoints, *inputs, **options)
    return (y, final), gradients._asdict()


def assert_agrees(arguments, weights, delta_softplus=True, segments=None):
    outputs, gradients = found(arguments, weights, delta_softplus, segments)
    outputs_ref, gradients_ref = expected(arguments, weights, delta_softplus)
    tolerance = TOLERANCE[arguments["u"].dtype]
    for output, output_ref in zip(outputs, outputs_ref, strict=True):
        assert rms_error(output, output_ref) < tolerance
    assert outputs[0].dtype == arguments["u"].dtype
    assert outputs[1].dtype == torch.float32
    for name, gradient in gradients.items():
        assert (gradient is None) == (arguments[name] is None), name
        if gradient is None:
            continue
        assert gradient.dtype == arguments[name].dtype, name
        if gradients_ref[name].any():
            assert rms_error(gradient, gradients_ref[name]) < tolerance, name
        else:  # A's at a first token without a state before it
            assert not gradient.any(), name


@pytest.mark.parametrize("segments", [None, 1, 2, 3])
@pytest.mark.parametrize("length", [1, 7, 32, 40, 63, 64, 65, 300, 1000])
def test_lengths(length, segments):
    assert_agrees(*make(length), segments=segments)


@pytest.mark.parametrize("left_out", OPTIONAL)
def test_each_optional_argument_left_out(left_out):
    assert_agrees(*make(40, options=set(OPTIONAL) - {left_out}))


@pytest.mark.parametrize("delta_softplus", [True, False])
def test_no_optional_argument(delta_softplus):
    arguments, (dy, _) = make(40, options=())
    if not delta_softplus:
        arguments["delta"] = arguments["delta"].abs() * 0.05
    assert_agrees(arguments, (dy, None), delta_softplus=delta_softplus)


@pytest.mark.parametrize("n", [4, 5, 20, 32, 64])
def test_state_sizes(n):
    assert_agrees(*make(40, n=n, d=40))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("length", "d"), [(40, 70), (1000, 70), (32, 256)])
def test_half_precision(dtype, length, d):
    assert_agrees(*make(length, d=d, dtype=dtype))


def test_small_steps_keep_their_digits():
    """softplus far below zero, where log(1 + e) would round e away."""
    arguments, weights = make(32)
    arguments["delta"] = arguments["delta"] - 6
    assert_agrees(arguments, weights)


def test_strided_sequences_and_transposed_states():
    arguments, weights = make(40)
    for name in ("u", "delta"):
        arguments[name] = arguments[name].repeat_interleave(2, 1)[:, ::2]
    for name in ("B", "C", "A", "initial_state"):
        value = arguments[name]
        arguments[name] = value.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert_agrees(arguments, weights)


def test_two_runs_are_equal_bit_for_bit():
    arguments, weights = make(40, dtype=torch.bfloat16)
    first, second = (found(arguments, weights, True) for _ in range(2))
    for a, b in zip(first[0], second[0], strict=True):
        assert torch.equal(a, b)
    for name, gradient in first[1].items():
        assert torch.equal(gradient, second[1][name]), name


@pytest.mark.parametrize("length", [7, 40, 300])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_gate_is_applied_last(length, dtype):
    arguments, (z, _) = make(length, dtype=dtype)
    inputs = tuple(arguments.values())
    z = z.repeat(1, 1, 2)[..., :70]  # as the half of a projection
    options = {"delta_softplus": True, "segments": 2}
    plain = selective_scan_forward(*inputs, save=True, **options)
    both = selective_scan_forward(*inputs, save=True, z_BLD=z, **options)
    alone = selective_scan_forward(*inputs, save=False, z_BLD=z, **options)
    assert torch.equal(both.y_BLD, plain.y_BLD)
    assert torch.equal(both.gated_BLD, alone.gated_BLD)
    assert alone.y_BLD is None
    wanted = plain.y_BLD.double() * silu(z.double())
    assert rms_error(both.gated_BLD, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize(("length", "channels"), [(7, 70), (40, 64), (130, 6)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_gates_gradient(length, channels, dtype):
    from workbench_mamba.scan.triton_selective_gate import gate_backward

    if length > LONGEST:
        pytest.skip("too long for the interpreter")
    generator = torch.Generator().manual_seed(length)
    dout, y = torch.randn(2, 2, length, channels, generator=generator).to(DEVICE, dtype)
    xz = torch.randn(2, length, 2 * channels, generator=generator).to(DEVICE, dtype)
    dxz = torch.full_like(xz, 5.0)
    z, dz = xz[..., channels:], dxz[..., channels:]
    leaves = [y.double().requires_grad_(), z.double().requires_grad_()]
    wanted = leaves[0] * silu(leaves[1])
    gradients = torch.autograd.grad(wanted, leaves, dout.double())
    out = torch.empty_like(y)
    dy = gate_backward(dout, y, z, dz, out, torch.empty_like(dout))
    for one, other in ((out, wanted), (dy, gradients[0]), (dz, gradients[1])):
        assert rms_error(one, other) < TOLERANCE[dtype]
    assert (dxz[..., :channels] == 5.0).all()
    assert torch.equal(gate_backward(dout, y, z, dz, None, dout), dy)  # in place


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_graph_replays_the_scan():
    arguments, _ = make(300, dtype=torch.bfloat16)
    inputs = tuple(arguments.values())
    options = {"delta_softplus": True, "save": False}
    expected_y = selective_scan_forward(*inputs, **options)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = selective_scan_forward(*inputs, **options)[0]
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected_y)
