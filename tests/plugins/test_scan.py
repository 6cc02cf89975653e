"""The scans against float64 loops, against themselves cut in two, and against transformers."""

import pytest
import torch
from torch import Tensor
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from tests.plugins.scan_cases import (
    CASES,
    GRADIENT_TOLERANCE,
    LENGTHS,
    OUTPUT_TOLERANCE,
    assert_agrees,
    borders,
    conv_arguments,
    conv_ref,
    each_scan,
    gradients,
    mamba_arguments,
    rms_error,
    ssd_arguments,
)
from tests.plugins.scan_cases import poisoned_memory as poisoned_memory
from workbench_mamba.scan import (
    causal_conv1d,
    causal_conv1d_update,
    selective_scan,
    selective_state_update,
    ssd,
    ssd_ref,
    ssd_state_update,
)


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
