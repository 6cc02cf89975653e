"""Mamba-2's Triton kernels against the loop over tokens, run on the CPU in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.plugins.scan_cases import borders, rms_error
from workbench_mamba.scan import ssd_ref

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
Arguments = dict[str, Any]  # tensors, or None for what is left out

NAMES = ("x", "dt", "A", "B", "C", "D", "initial")
TOLERANCES = {torch.float32: 6e-4, torch.float16: 3e-2, torch.bfloat16: 3e-2}
DTYPES = list(TOLERANCES)


def kernels() -> Any:
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    from workbench_mamba.scan import triton_ssd

    return triton_ssd


@pytest.fixture(autouse=True)
def poisoned_memory() -> Any:
    """Uninitialised memory holds NaN, so that forgetting to write an element shows."""
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(previous)


def arguments(
    length: int,
    dtype: torch.dtype,
    *,
    p: int = 64,
    n: int = 128,
    h: int = 4,
    g: int = 2,
    without: tuple[str, ...] = (),
) -> Arguments:
    """Arguments on the CPU, borders of documents and steps of zero included."""
    torch.manual_seed(length)
    batch = 2
    dt = torch.rand(batch, length, h) * 0.2
    dt[:, length // 2 : length // 2 + 3] = 0
    values = {
        "x": torch.randn(batch, length, h, p).to(dtype),
        "dt": dt,
        "A": -torch.rand(h) * 8,
        "B": torch.randn(batch, length, g, n).to(dtype),
        "C": torch.randn(batch, length, g, n).to(dtype),
        "D": torch.randn(h),
        "initial": torch.randn(batch, h, p, n),
        "seq_idx": borders(length),
        "dfinal": torch.randn(batch, h, p, n),
        "dy": torch.randn(batch, length, h, p).to(dtype),
    }
    return {name: None if name in without else value for name, value in values.items()}


def sliced(values: Arguments) -> Arguments:
    """The arguments on the device; x, B and C as the convolution leaves them: slices of one."""
    there = {name: None if value is None else value.to(DEVICE) for name, value in values.items()}
    parts = [there[name].flatten(2) for name in ("x", "B", "C")]
    slices = torch.cat(parts, 2).split([part.shape[2] for part in parts], 2)
    for name, part in zip(("x", "B", "C"), slices, strict=True):
        there[name] = part.unflatten(2, values[name].shape[2:])
    return there


def run(values: Arguments) -> tuple[Tensor, Tensor, Arguments]:
    """Output, final state and gradients of the kernels, on the device."""
    ssd = kernels()
    there = dict(values)
    dy, dfinal = there.pop("dy"), there.pop("dfinal")
    y, final, saved = ssd.ssd_forward(*there.values(), save=True)
    gradients = ssd.ssd_backward(dy, dfinal, saved, *there.values())
    return y, final, dict(zip(NAMES, gradients, strict=True))


def reference(values: Arguments) -> tuple[Tensor, Tensor, Arguments]:
    leaves = {
        name: None if values[name] is None else values[name].double().requires_grad_()
        for name in NAMES
    }
    *positional, initial = leaves.values()
    y, final = ssd_ref(*positional, initial_state_BHPN=initial, seq_idx_BL=values["seq_idx"])
    loss = (y * values["dy"].double()).sum()
    if values["dfinal"] is not None:
        loss = loss + (final * values["dfinal"].double()).sum()
    loss.backward()
    return y, final, {k: None if leaf is None else leaf.grad for k, leaf in leaves.items()}


def assert_agrees(values: Arguments) -> None:
    y, final, gradients = run(sliced(values))
    y_ref, final_ref, gradients_ref = reference(values)
    dtype = values["x"].dtype
    assert y.dtype == gradients["x"].dtype == gradients["B"].dtype == gradients["C"].dtype == dtype
    assert final.dtype == gradients["dt"].dtype == gradients["A"].dtype == torch.float32
    assert rms_error(y.cpu(), y_ref) < TOLERANCES[dtype]
    assert rms_error(final.cpu(), final_ref) < TOLERANCES[dtype]
    for name, wanted in gradients_ref.items():
        if wanted is None:
            assert gradients[name] is None
        elif wanted.abs().max() == 0:
            assert gradients[name].abs().max() < 1e-6, name
        else:
            assert rms_error(gradients[name].cpu(), wanted) < TOLERANCES[dtype], name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 7, 63, 64, 65, 300, 1000])
def test_agrees_with_the_loop_over_tokens(length, dtype):
    assert_agrees(arguments(length, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "without",
    [("D",), ("initial",), ("seq_idx",), ("dfinal",), ("D", "initial", "seq_idx", "dfinal")],
    ids="-".join,
)
def test_every_optional_argument_may_be_missing(without, dtype):
    assert_agrees(arguments(300, dtype, g=1, without=without))


# Every kind of tile once, not every pair of sizes: each is compiled anew.
@pytest.mark.parametrize(
    ("p", "n", "dtype"),
    [
        (16, 16, torch.bfloat16),
        (32, 64, torch.bfloat16),
        (64, 32, torch.bfloat16),
        (128, 128, torch.bfloat16),
        (32, 256, torch.bfloat16),
        (128, 256, torch.bfloat16),
        (16, 16, torch.float32),
        (128, 64, torch.float32),
        (64, 256, torch.float32),
    ],
    ids=str,
)
def test_every_size_agrees(p, n, dtype):
    assert_agrees(arguments(140, dtype, p=p, n=n))


@pytest.mark.parametrize(("h", "g"), [(1, 1), (3, 1), (40, 2)])
def test_any_number_of_heads_agrees(h, g):
    assert_agrees(arguments(70, torch.bfloat16, n=64, h=h, g=g))


def test_a_steep_decay_neither_overflows_nor_leaks():
    values = arguments(300, torch.bfloat16, without=("seq_idx",))
    values["dt"] = values["dt"] * 400
    assert_agrees(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_with_a_step_of_zero_leave_the_state(dtype):
    values = arguments(200, dtype, without=("seq_idx",))
    values["dt"][:, 130:] = 0
    _, final, gradients = run(sliced(values))
    cut = {k: v[:, :130] if k in ("x", "dt", "B", "C", "dy") else v for k, v in values.items()}
    _, final_cut, _ = run(sliced(cut))
    assert torch.equal(final, final_cut)
    assert torch.isfinite(gradients["dt"]).all()
    assert gradients["B"][:, 130:].float().abs().max() < 1e-6


def test_nothing_is_saved_unless_asked_and_results_do_not_change():
    ssd = kernels()
    values = sliced(arguments(300, torch.bfloat16))
    rest = [value for name, value in values.items() if name not in ("dy", "dfinal")]
    y, final, saved = ssd.ssd_forward(*rest, save=True)
    y_plain, final_plain, nothing = ssd.ssd_forward(*rest, save=False)
    assert saved
    assert nothing == []
    assert torch.equal(y, y_plain)
    assert torch.equal(final, final_plain)


def assert_same(first: Any, second: Any) -> None:
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    for name in NAMES:
        assert torch.equal(first[2][name], second[2][name]), name


def test_runs_are_bitwise_equal():
    values = sliced(arguments(1000, torch.bfloat16))
    assert_same(run(values), run(values))


def test_strides_do_not_matter():
    values = sliced(arguments(130, torch.bfloat16))
    packed = {name: value.contiguous() for name, value in values.items()}
    spread = packed | {
        name: values[name].transpose(0, 1).contiguous().transpose(0, 1)
        for name in ("x", "dt", "B", "C", "seq_idx", "dy")
    }
    last = packed | {"dy": packed["dy"].transpose(2, 3).contiguous().transpose(2, 3)}
    for other in (packed, spread, last):
        assert_same(run(values), run(other))


def capture(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def test_a_cuda_graph_replays_on_new_numbers():
    ssd = kernels()
    values = sliced(arguments(300, torch.bfloat16))
    dy, dfinal = values.pop("dy"), values.pop("dfinal")

    def step() -> list[Tensor]:
        y, final, saved = ssd.ssd_forward(*values.values(), save=True)
        return [y, final, *ssd.ssd_backward(dy, dfinal, saved, *values.values())]

    graph, results = capture(step)
    values["x"].copy_(torch.randn(values["x"].shape))
    values["dt"].mul_(0.5)
    graph.replay()
    replayed = [result.clone() for result in results]
    assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": 24}, "head dim 24"),
        ({"n": 48}, "state 48"),
        ({"dtype": torch.float64}, "float64"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(change, message):
    ssd = kernels()
    values = arguments(7, **{"dtype": torch.bfloat16, **change})
    rest = [value.to(DEVICE) for name, value in values.items() if name not in ("dy", "dfinal")]
    with pytest.raises(ValueError, match=message):
        ssd.ssd_forward(*rest, save=False)


def test_mixed_dtypes_are_refused():
    ssd = kernels()
    values = arguments(7, torch.bfloat16)
    values["B"] = values["B"].float()
    rest = [value.to(DEVICE) for name, value in values.items() if name not in ("dy", "dfinal")]
    with pytest.raises(ValueError, match="differ"):
        ssd.ssd_forward(*rest, save=False)
