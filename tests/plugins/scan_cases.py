"""What the tests of the scans share: arguments, references, and how the two are compared."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench_mamba.scan import causal_conv1d, selective_scan, selective_scan_ref, ssd, ssd_ref

torch.set_num_threads(1)

Arguments = dict[str, Tensor]
Scan = Callable[..., tuple[Tensor, Tensor]]
OUTPUT_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-5
LENGTHS = (1, 7, 63, 64, 65, 1000)


def rms_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    difference = (actual.detach().double() - expected.detach().double()).square().mean().sqrt()
    return float(difference / expected.detach().double().square().mean().sqrt().clamp_min(1e-30))


def mamba_arguments(length: int, batch: int = 2, d: int = 12, n: int = 5) -> Arguments:
    torch.manual_seed(length)
    return {
        "u_BLD": torch.randn(batch, length, d),
        "delta_BLD": torch.rand(batch, length, d) * 0.2 + 0.01,
        "A_DN": -torch.rand(d, n) * 8,
        "B_BLN": torch.randn(batch, length, n),
        "C_BLN": torch.randn(batch, length, n),
        "D_D": torch.randn(d),
        "initial_state_BDN": torch.randn(batch, d, n),
    }


def ssd_arguments(length: int, batch: int = 2, h: int = 4, g: int = 2) -> Arguments:
    torch.manual_seed(length)
    p, n = 6, 5
    return {
        "x_BLHP": torch.randn(batch, length, h, p),
        "dt_BLH": torch.rand(batch, length, h) * 0.2 + 0.01,
        "A_H": -torch.rand(h) * 8,
        "B_BLGN": torch.randn(batch, length, g, n),
        "C_BLGN": torch.randn(batch, length, g, n),
        "D_H": torch.randn(h),
        "initial_state_BHPN": torch.randn(batch, h, p, n),
    }


def conv_arguments(length: int, batch: int = 2, c: int = 10, w: int = 4) -> Arguments:
    torch.manual_seed(length)
    return {
        "x_BLC": torch.randn(batch, length, c),
        "weight_CW": torch.randn(c, w),
        "bias_C": torch.randn(c),
        "initial_state_BCW": torch.randn(batch, c, w),
    }


def conv_ref(
    x_BLC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None = None,
    *,
    initial_state_BCW: Tensor,
    seq_idx_BL: Tensor | None = None,
    activation: str | None = "silu",
) -> tuple[Tensor, Tensor]:
    """Token by token, with a window that is emptied at document borders."""
    window, outputs = initial_state_BCW, []
    for t in range(x_BLC.shape[1]):
        if seq_idx_BL is not None and t > 0:
            window = window * (seq_idx_BL[:, t] == seq_idx_BL[:, t - 1])[:, None, None]
        window = torch.cat((window[:, :, 1:], x_BLC[:, t, :, None]), 2)
        y = (window * weight_CW).sum(2) + (0 if bias_C is None else bias_C)
        outputs.append(torch.nn.functional.silu(y) if activation else y)
    return torch.stack(outputs, 1), window


def gradients(
    scan: Scan, arguments: Arguments, dtype: torch.dtype, **options: Any
) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """Outputs, and the gradients of a weighted sum of both of them."""
    leaves = {k: v.to(dtype, copy=True).requires_grad_() for k, v in arguments.items()}
    y, final = scan(**leaves, **options)
    torch.manual_seed(0)
    loss = (y * torch.randn(y.shape).to(dtype)).sum()
    loss = loss + (final * torch.randn(final.shape).to(dtype)).sum()
    loss.backward()
    return (y, final), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def assert_agrees(fast: Scan, ref: Scan, arguments: Arguments, **options: Any) -> None:
    """Fast in float32 against the reference in float64, poisoning the memory that fast gets."""
    chunk = {"chunk_size": options.pop("chunk_size")} if "chunk_size" in options else {}
    (y, final), grads = gradients(fast, arguments, torch.float32, **options, **chunk)
    (y_ref, final_ref), grads_ref = gradients(ref, arguments, torch.float64, **options)
    assert rms_error(y, y_ref) < OUTPUT_TOLERANCE
    assert rms_error(final, final_ref) < OUTPUT_TOLERANCE
    assert grads.keys() == grads_ref.keys() == arguments.keys()
    for name, gradient in grads.items():
        assert rms_error(gradient, grads_ref[name]) < GRADIENT_TOLERANCE, name
    with torch.no_grad():
        y_plain, final_plain = fast(**arguments, **options, **chunk)
    assert torch.equal(y_plain, y)
    assert torch.equal(final_plain, final)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Any:
    """Uninitialised memory holds NaN, so that forgetting to write an element shows."""
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(previous)


def borders(length: int) -> Tensor:
    """Two rows with different borders: at, next to and far from multiples of 16 and 64."""
    seq_idx = torch.zeros(2, length, dtype=torch.int32)
    for row, positions in enumerate(((1, 16, 64, 65, 200, 640), (5, 33, 63, 100, 128, 130))):
        for position in positions:
            seq_idx[row, position:] += 1
    return seq_idx


CASES = {
    "mamba": (selective_scan, selective_scan_ref, mamba_arguments),
    "ssd": (ssd, ssd_ref, ssd_arguments),
}
ALL = CASES | {"conv": (causal_conv1d, conv_ref, conv_arguments)}
each_scan = pytest.mark.parametrize("case", CASES)
each_function = pytest.mark.parametrize("case", ALL)
