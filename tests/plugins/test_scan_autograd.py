"""The scans among torch's machinery: autograd, meta tensors, autocast, bfloat16, inference mode."""

import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.plugins.scan_cases import (
    ALL,
    CASES,
    GRADIENT_TOLERANCE,
    OUTPUT_TOLERANCE,
    borders,
    conv_arguments,
    each_function,
    each_scan,
    gradients,
    mamba_arguments,
    rms_error,
    ssd_arguments,
)
from tests.plugins.scan_cases import poisoned_memory as poisoned_memory
from workbench_mamba.scan import causal_conv1d, selective_scan, ssd


@each_function
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


@each_function
def test_double_backward_raises(case: str) -> None:
    fast, _, make = ALL[case]
    arguments = {k: v.requires_grad_() for k, v in make(7).items()}
    y, _ = fast(**arguments)
    with pytest.raises(RuntimeError, match="only once"):
        torch.autograd.grad(y.sum(), list(arguments.values()), create_graph=True)


@pytest.mark.parametrize("requires_grad", [False, True])
@each_function
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


@each_function
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


@each_function
def test_inference_mode_leaves_no_trace(case: str) -> None:
    fast, _, make = ALL[case]
    with torch.inference_mode():
        y, _ = fast(**make(300, batch=3))
    (y_after, _), _ = gradients(fast, make(300, batch=3), torch.float32)
    assert torch.equal(y, y_after)


@each_function
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


@each_function
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


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_compiled_it_gives_the_same() -> None:
    """As blocks are on a CUDA device where no kernel takes a scan's place."""
    compiled, arguments = torch.compile(ssd, dynamic=False), ssd_arguments(17)
    outputs, grads = gradients(compiled, arguments, torch.float32)
    wanted_outputs, wanted_grads = gradients(ssd, arguments, torch.float32)
    for found, wanted in zip(outputs, wanted_outputs, strict=True):
        assert rms_error(found, wanted) < OUTPUT_TOLERANCE
    assert grads.keys() == wanted_grads.keys()
    for name, gradient in grads.items():
        assert rms_error(gradient, wanted_grads[name]) < GRADIENT_TOLERANCE, name
