"""The scans against float64 loops, against themselves cut in two, and against transformers."""

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from workbench_mamba.scan import (
    causal_conv1d,
    causal_conv1d_update,
    selective_scan,
    selective_scan_ref,
    selective_state_update,
    ssd,
    ssd_ref,
    ssd_state_update,
)

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
each_scan = pytest.mark.parametrize("case", CASES)


@pytest.mark.parametrize("length", LENGTHS)
@each_scan
def test_outputs_and_gradients(case: str, length: int) -> None:
    fast, ref, make = CASES[case]
    assert_agrees(fast, ref, make(length))


@pytest.mark.parametrize("chunk_size", [1, 4, 16, 64, 200])
@each_scan
def test_any_chunk_size(case: str, chunk_size: int) -> None:
    fast, ref, make = CASES[case]
    assert_agrees(fast, ref, make(65), chunk_size=chunk_size)


@pytest.mark.parametrize("length", [7, 64, 129, 700])
@each_scan
def test_document_borders(case: str, length: int) -> None:
    fast, ref, make = CASES[case]
    assert_agrees(fast, ref, make(length), seq_idx_BL=borders(length))


@each_scan
def test_a_document_is_alone(case: str) -> None:
    fast, _, make = CASES[case]
    arguments = make(100)
    seq_idx = torch.zeros(2, 100, dtype=torch.int64)
    seq_idx[:, 37:] = 1
    y, final = fast(**arguments, seq_idx_BL=seq_idx)
    alone = {
        name: value[:, 37:] if "L" in name.rpartition("_")[2] else value
        for name, value in arguments.items()
        if not name.startswith("initial")
    }
    y_alone, final_alone = fast(**alone)
    assert rms_error(y[:, 37:], y_alone) < OUTPUT_TOLERANCE
    assert rms_error(final, final_alone) < OUTPUT_TOLERANCE


@each_scan
def test_blocks_of_rows(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, ref, make = CASES[case]
    module = "selective_chunks" if case == "mamba" else "state_space_chunks"
    monkeypatch.setattr(f"workbench_mamba.scan.{module}.CACHE_BLOCK", 2 * 12 * 5 * 16)
    arguments = make(33, batch=5)
    assert_agrees(fast, ref, arguments, seq_idx_BL=borders(33)[[0, 1, 0, 1, 0]])


@each_scan
def test_without_optional_arguments(case: str) -> None:
    fast, ref, make = CASES[case]
    arguments = {k: v for k, v in make(65).items() if k not in ("D_D", "D_H")}
    assert_agrees(fast, ref, {k: v for k, v in arguments.items() if "initial" not in k})
    assert_agrees(fast, ref, arguments)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups(groups: int) -> None:
    assert_agrees(ssd, ssd_ref, ssd_arguments(65, g=groups), chunk_size=16)


@pytest.mark.parametrize("strength", [90.0, 500.0])
@each_scan
def test_strong_decay(case: str, strength: float) -> None:
    """Exponents from 0 to -500 a step, mixed: neither overflow nor lost precision."""
    fast, ref, make = CASES[case]
    arguments = make(150)
    name = "delta_BLD" if case == "mamba" else "dt_BLH"
    is_strong = torch.rand(arguments[name].shape) < 0.2
    arguments[name] = torch.where(is_strong, strength / 8, arguments[name])
    arguments["A_DN" if case == "mamba" else "A_H"].fill_(-8.0)
    assert_agrees(fast, ref, arguments, seq_idx_BL=borders(150))
    everywhere = arguments | {name: torch.full_like(arguments[name], strength / 8)}
    y, grads = gradients(fast, everywhere, torch.float32)
    assert all(value.isfinite().all() for value in (*y, *grads.values()))


@pytest.mark.parametrize("cut", [1, 17, 64, 99])
@each_scan
def test_a_sequence_in_two_parts(case: str, cut: int) -> None:
    fast, _, make = CASES[case]
    arguments = make(100)
    state_name = next(name for name in arguments if "initial" in name)

    def in_two(**leaves: Tensor) -> tuple[Tensor, Tensor]:
        halves = [
            {k: v[:, part] if "L" in k.rpartition("_")[2] else v for k, v in leaves.items()}
            for part in (slice(cut), slice(cut, None))
        ]
        y_first, state = fast(**halves[0])
        y_second, state = fast(**halves[1] | {state_name: state})
        return torch.cat((y_first, y_second), 1), state

    (y, final), grads = gradients(fast, arguments, torch.float32)
    (y_two, final_two), grads_two = gradients(in_two, arguments, torch.float32)
    assert rms_error(y_two, y) < OUTPUT_TOLERANCE
    assert rms_error(final_two, final) < OUTPUT_TOLERANCE
    for name, gradient in grads.items():
        assert rms_error(grads_two[name], gradient) < GRADIENT_TOLERANCE, name


@each_scan
def test_causality(case: str) -> None:
    fast, _, make = CASES[case]
    arguments = make(100)
    y, _ = fast(**arguments)
    changed = {k: v.clone() for k, v in arguments.items()}
    for name, value in changed.items():
        if "L" in name.rpartition("_")[2]:
            value[:, 70:] = torch.rand(value[:, 70:].shape)
    y_changed, _ = fast(**changed)
    assert torch.equal(y_changed[:, :70], y[:, :70])
    assert not torch.allclose(y_changed[:, 70:], y[:, 70:])


def test_selective_state_update_equals_the_scan() -> None:
    a = mamba_arguments(20)
    y, final = selective_scan(**a)
    state = a["initial_state_BDN"].clone()
    for t in range(20):
        one = (a[name][:, t] for name in ("B_BLN", "C_BLN"))
        y_t = selective_state_update(
            state, a["u_BLD"][:, t], a["delta_BLD"][:, t], a["A_DN"], *one, a["D_D"]
        )
        assert rms_error(y_t, y[:, t]) < OUTPUT_TOLERANCE
    assert rms_error(state, final) < OUTPUT_TOLERANCE


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_ssd_state_update_equals_the_scan(groups: int) -> None:
    a = ssd_arguments(20, g=groups)
    y, final = ssd(**a)
    state = a["initial_state_BHPN"].clone()
    for t in range(20):
        one = (a[name][:, t] for name in ("B_BLGN", "C_BLGN"))
        y_t = ssd_state_update(
            state, a["x_BLHP"][:, t], a["dt_BLH"][:, t], a["A_H"], *one, a["D_H"]
        )
        assert rms_error(y_t, y[:, t]) < OUTPUT_TOLERANCE
    assert rms_error(state, final) < OUTPUT_TOLERANCE


def test_selective_scan_against_transformers() -> None:
    a = mamba_arguments(65)
    del a["initial_state_BDN"]
    y, final = selective_scan(**a)
    by_channel = (a[name].transpose(1, 2) for name in ("u_BLD", "delta_BLD"))
    by_state = (a[name].transpose(1, 2) for name in ("B_BLN", "C_BLN"))
    y_hf, final_hf = modeling_mamba.mamba_selective_scan(
        *by_channel, a["A_DN"], *by_state, a["D_D"], return_last_state=True
    )
    assert rms_error(y, y_hf.transpose(1, 2)) < OUTPUT_TOLERANCE
    assert rms_error(final, final_hf) < OUTPUT_TOLERANCE


def test_ssd_against_transformers() -> None:
    a = ssd_arguments(65)
    y, final = ssd(**a)
    y_hf, final_hf = modeling_mamba2.mamba2_chunk_scan(
        a["x_BLHP"], a["dt_BLH"], a["A_H"], a["B_BLGN"], a["C_BLGN"], 16, a["D_H"],
        initial_states=a["initial_state_BHPN"], return_final_states=True,
    )  # fmt: skip
    assert rms_error(y, y_hf) < 1e-5  # theirs takes differences of float32 sums
    assert rms_error(final, final_hf) < 1e-5


def test_convolution_against_transformers() -> None:
    a = conv_arguments(65)
    x, weight, bias = a["x_BLC"], a["weight_CW"], a["bias_C"]
    y, _ = causal_conv1d(x, weight, bias)
    y_hf = modeling_mamba.causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu")
    assert rms_error(y, y_hf.transpose(1, 2)) < OUTPUT_TOLERANCE
    state, state_hf = (a["initial_state_BCW"].clone() for _ in range(2))
    y = causal_conv1d_update(state, x[:, 0], weight, bias, "silu")
    y_hf = modeling_mamba.causal_conv1d_update(
        x[:, :1].transpose(1, 2), state_hf, weight, bias, activation="silu"
    )
    assert rms_error(y, y_hf.squeeze(2)) < OUTPUT_TOLERANCE
    assert torch.equal(state, state_hf)


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("has_borders", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 100])
def test_convolution(length: int, width: int, has_borders: bool, activation: str | None) -> None:
    options = {"activation": activation, "seq_idx_BL": borders(length) if has_borders else None}
    assert_agrees(causal_conv1d, conv_ref, conv_arguments(length, w=width), **options)


def test_convolution_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench_mamba.scan.convolution.CACHE_BLOCK", 2 * 20 * 10)
    arguments = conv_arguments(20, batch=5)
    assert_agrees(causal_conv1d, conv_ref, arguments, seq_idx_BL=borders(20)[[0, 1, 0, 1, 0]])
    del arguments["bias_C"]
    assert_agrees(causal_conv1d, conv_ref, arguments)


@pytest.mark.parametrize("cut", [1, 2, 3, 30])
def test_convolution_in_two_parts(cut: int) -> None:
    a = conv_arguments(40)
    y, final = causal_conv1d(**a)
    x = a.pop("x_BLC")
    y_first, state = causal_conv1d(x[:, :cut], **a)
    y_second, state = causal_conv1d(x[:, cut:], **a | {"initial_state_BCW": state})
    assert rms_error(torch.cat((y_first, y_second), 1), y) < OUTPUT_TOLERANCE
    assert torch.equal(state, final)
    step, state = causal_conv1d_update, a["initial_state_BCW"].clone()
    y_steps = [step(state, x[:, t], a["weight_CW"], a["bias_C"], "silu") for t in range(40)]
    assert rms_error(torch.stack(y_steps, 1), y) < OUTPUT_TOLERANCE
    assert torch.equal(state, final)


ALL = CASES | {"conv": (causal_conv1d, conv_ref, conv_arguments)}


@pytest.mark.parametrize("case", ALL)
def test_gradcheck(case: str) -> None:
    fast, _, make = ALL[case]
    small = {"mamba": {"d": 3, "n": 2}, "ssd": {"h": 2, "g": 1}, "conv": {"c": 3, "w": 3}}[case]
    arguments = make(7, **small)
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 0]])
    options = {"seq_idx_BL": seq_idx} | ({} if case == "conv" else {"chunk_size": 4})
    leaves = [value.double().requires_grad_() for value in arguments.values()]
    assert torch.autograd.gradcheck(
        lambda *values: fast(**dict(zip(arguments, values, strict=True)), **options), leaves
    )


@pytest.mark.parametrize("case", ALL)
def test_double_backward_raises(case: str) -> None:
    fast, _, make = ALL[case]
    arguments = {k: v.requires_grad_() for k, v in make(7).items()}
    y, _ = fast(**arguments)
    with pytest.raises(RuntimeError, match="only once"):
        torch.autograd.grad(y.sum(), list(arguments.values()), create_graph=True)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("case", ALL)
def test_meta_device(case: str, requires_grad: bool) -> None:
    fast, _, make = ALL[case]
    arguments = make(65)
    y, final = fast(**arguments, seq_idx_BL=borders(65))
    metas = {k: v.to("meta").requires_grad_(requires_grad) for k, v in arguments.items()}
    y_meta, final_meta = fast(**metas, seq_idx_BL=borders(65).to("meta"))
    for meta, real in ((y_meta, y), (final_meta, final)):
        assert meta.is_meta
        assert (meta.shape, meta.dtype) == (real.shape, real.dtype)
    if requires_grad:
        y_meta.sum().backward()
        grads = [(leaf, leaf.grad) for leaf in metas.values() if leaf.grad is not None]
        assert grads
        assert all(grad.shape == leaf.shape for leaf, grad in grads)


@pytest.mark.parametrize("case", ALL)
def test_autocast_changes_nothing(case: str) -> None:
    fast, _, make = ALL[case]
    plain, plain_grads = gradients(fast, make(65), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, cast_grads = gradients(fast, make(65), torch.float32)
    assert torch.equal(cast[0], plain[0])
    assert torch.equal(cast[1], plain[1])
    assert all(torch.equal(cast_grads[name], plain_grads[name]) for name in plain_grads)


@each_scan
def test_bfloat16_in_and_out(case: str) -> None:
    fast, ref, make = CASES[case]
    halves = {k: v.bfloat16().requires_grad_() for k, v in make(200).items()}
    y, final = fast(**halves)
    y_ref, final_ref = ref(**{k: v.double() for k, v in halves.items()})
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    assert rms_error(y, y_ref) < 3e-3  # the rounding of the output alone
    assert rms_error(final, final_ref) < OUTPUT_TOLERANCE
    y.float().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in halves.values())


@pytest.mark.parametrize("case", ALL)
def test_inference_mode_leaves_no_trace(case: str) -> None:
    fast, _, make = ALL[case]
    with torch.inference_mode():
        y, _ = fast(**make(300, batch=3))
    (y_after, _), _ = gradients(fast, make(300, batch=3), torch.float32)
    assert torch.equal(y, y_after)


@pytest.mark.parametrize("case", ALL)
def test_results_survive_later_calls(case: str) -> None:
    fast, _, make = ALL[case]
    results, grads = gradients(fast, make(65), torch.float32)
    kept = [value.clone() for value in (*results, *grads.values())]
    gradients(fast, {k: v + 1 for k, v in make(65).items()}, torch.float32)
    assert all(map(torch.equal, kept, (*results, *grads.values())))


@each_scan
def test_only_the_final_state_is_used(case: str) -> None:
    fast, ref, make = CASES[case]
    grads = []
    for scan, dtype in ((fast, torch.float32), (ref, torch.float64)):
        leaves = {k: v.to(dtype).requires_grad_() for k, v in make(65).items()}
        used = [v for k, v in leaves.items() if k not in ("D_D", "D_H", "C_BLN", "C_BLGN")]
        grads.append(torch.autograd.grad(scan(**leaves)[1].square().sum(), used))
    assert all(rms_error(*pair) < GRADIENT_TOLERANCE for pair in zip(*grads, strict=True))


@pytest.mark.parametrize("case", ALL)
def test_errors_name_the_argument(case: str) -> None:
    fast, _, make = ALL[case]
    with pytest.raises(ValueError, match="at least one token"):
        fast(**make(0))
    with pytest.raises(ValueError, match="seq_idx has shape"):
        fast(**make(8), seq_idx_BL=borders(7))
    arguments = make(8)
    state = next(name for name in arguments if "initial" in name)
    with pytest.raises(ValueError, match=r"state has shape \(1,"):
        fast(**arguments | {state: arguments[state][:1]})


def test_the_folder_works_under_another_name(tmp_path: Path, monkeypatch: Any) -> None:
    """Exporters copy it beside a model's code."""
    here = Path(str(importlib.import_module("workbench_mamba.scan").__file__)).parent
    shutil.copytree(here, tmp_path / "copied_scan", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.syspath_prepend(tmp_path)
    copied = importlib.import_module("copied_scan")
    arguments = ssd_arguments(9)
    assert copied.ssd is not ssd
    assert torch.equal(copied.ssd(**arguments)[0], ssd(**arguments)[0])


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="chunk_size is 0"):
        selective_scan(**mamba_arguments(8), chunk_size=0)
    with pytest.raises(ValueError, match="4 heads cannot be shared"):
        ssd(**ssd_arguments(8, g=3))
    with pytest.raises(ValueError, match="activation is 'gelu'"):
        causal_conv1d(**conv_arguments(8), activation="gelu")
