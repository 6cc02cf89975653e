"""Attention by its properties: the contract of layers, its windows, its cache and its costs.

Shape suffixes: B batch, T tokens, D d_model.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from workbench import config as configs
from workbench.errors import WorkbenchError
from workbench.layer import PLAIN, Context
from workbench_attention.attention import Attention

D_MODEL = 32
SHAPE = {"num_heads": 4, "num_kv_heads": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "rope": {},
    "partial": {"partial_rotary_factor": 0.5, "rope_theta": 500.0},
    "none": {"position": "none", "bias": True, "out_bias": True, "scale": 0.5},
    "alibi": {"position": "alibi", "num_heads": 6, "num_kv_heads": 3, "head_dim": 4},
    "mqa": {"num_kv_heads": 1, "head_dim": 12, "qk_norm": True},
    "mha": {"num_kv_heads": None},
    "window-1": {"sliding_window": 1},
    "window-5": {"sliding_window": 5},
    "window-5-alibi": {"sliding_window": 5, "position": "alibi"},
    "window-100": {"sliding_window": 100},
}
each_option = pytest.mark.parametrize("option", OPTIONS)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def config(option: str) -> Any:
    return configs.from_dict(Attention.Config, SHAPE | OPTIONS[option])


def build(option: str = "rope", dtype: torch.dtype = torch.float64) -> Attention:
    """A layer with random weights, none of them neutral."""
    layer = Attention(D_MODEL, config(option), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return layer


def tokens(batch: int, length: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, D_MODEL, generator=generator, dtype=dtype)


def relative(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max())


@each_option
def test_no_token_depends_on_a_later_one_or_on_one_outside_the_window(option: str) -> None:
    layer = build(option)
    window = layer.config.sliding_window or 12
    reach_TS = torch.zeros(12, 12)
    x_BTD = tokens(1, 12).requires_grad_()
    outputs_TD = layer(x_BTD)[0]
    for position in range(12):
        (gradient,) = torch.autograd.grad(outputs_TD[position].sum(), x_BTD, retain_graph=True)
        reach_TS[position] = gradient[0].abs().sum(-1)
    expected_TS = torch.ones(12, 12, dtype=torch.bool).tril().triu(1 - window)
    assert torch.equal(reach_TS != 0, expected_TS)


def cached(
    layer: Attention, x_BTD: Tensor, calls: list[int], context: Context = PLAIN
) -> tuple[Tensor, Any]:
    """Outputs through a state: prefill calls of the given lengths, then steps."""
    state = layer.init_state(x_BTD.shape[0], x_BTD.shape[1])
    outputs, start = [], 0
    with torch.no_grad():
        for length in calls:
            part = slice(start, start + length)
            call = Context(
                attention_mask_BT=_part(context.attention_mask_BT, part),
                seq_idx_BT=_part(context.seq_idx_BT, part),
                prefix_lengths_B=context.prefix_lengths_B if start == 0 else None,
            )
            outputs.append(layer(x_BTD[:, part], call, state))
            start += length
        outputs += [layer.step(x_BD, state)[:, None] for x_BD in x_BTD[:, start:].unbind(1)]
    return torch.cat(outputs, dim=1), state


def _part(tensor_BT: Tensor | None, part: slice) -> Tensor | None:
    return None if tensor_BT is None else tensor_BT[:, part]


@pytest.mark.parametrize("calls", [[], [1], [7], [23], [3, 4, 11], [1, 1, 6, 1], [12, 11]])
@each_option
def test_prefill_in_any_pieces_and_steps_equal_the_forward(option: str, calls: list[int]) -> None:
    layer, x_BTD = build(option), tokens(2, 23)
    actual_BTD, state = cached(layer, x_BTD, calls)
    assert relative(actual_BTD, layer(x_BTD)) < 1e-10
    assert state.length == 23


@pytest.mark.parametrize("option", ["rope", "alibi", "window-5", "window-5-alibi", "window-100"])
def test_the_cache_remembers_padding_documents_and_prefix(option: str) -> None:
    layer, x_BTD = build(option), tokens(3, 20)
    mask_BT = torch.ones(3, 20, dtype=torch.bool)
    mask_BT[1, :7] = False
    seq_idx_BT = torch.zeros(3, 20, dtype=torch.int32)
    seq_idx_BT[0, 4:], seq_idx_BT[2, 2:8], seq_idx_BT[2, 8:] = 1, 1, 2
    for context in (
        Context(attention_mask_BT=mask_BT),
        Context(seq_idx_BT=seq_idx_BT),
        Context(attention_mask_BT=mask_BT, seq_idx_BT=seq_idx_BT),
        Context(prefix_lengths_B=torch.tensor([1, 4, 9])),
    ):
        expected_BTD = layer(x_BTD, context)
        for calls in ([9], [9, 1, 3], [10, 10], [12, 4]):
            actual_BTD, _ = cached(layer, x_BTD, calls, context)
            difference_BTD = (actual_BTD - expected_BTD).abs()
            assert difference_BTD[mask_BT].max() < 1e-10, (context, calls)


@each_option
def test_a_later_call_may_begin_with_a_new_document_or_continue_the_last(option: str) -> None:
    layer, x_BTD = build(option), tokens(3, 16)
    seq_idx_BT = torch.zeros(3, 16, dtype=torch.int32)
    seq_idx_BT[0, 8:], seq_idx_BT[1, 4:] = 1, 1
    context = Context(seq_idx_BT=seq_idx_BT)
    actual_BTD, _ = cached(layer, x_BTD, [8, 6], context)
    assert relative(actual_BTD, layer(x_BTD, context)) < 1e-10


def test_a_ring_holds_the_window_alone_over_many_steps() -> None:
    layer, x_BTD = build("window-5"), tokens(1, 300)
    with torch.no_grad():
        expected_BTD = layer(x_BTD)
    actual_BTD, state = cached(layer, x_BTD, [11, 2])
    assert relative(actual_BTD, expected_BTD) < 1e-10
    assert state.keys_BHLP.shape == (1, 2, 5, 8)
    assert state.num_bytes == 2 * 2 * 5 * 8 * 8


def test_a_selected_state_continues_its_rows() -> None:
    layer, x_BTD = build(), tokens(3, 8)
    mask_BT = torch.ones(3, 8, dtype=torch.bool)
    mask_BT[2, :3] = False
    state = layer.init_state(3, 9)
    next_BD = tokens(3, 1, seed=5)[:, 0]
    with torch.no_grad():
        layer(x_BTD, Context(attention_mask_BT=mask_BT), state)
        order = torch.tensor([2, 0, 2])
        selected = state.select(order)
        expected_BD = layer.step(next_BD, state)
        assert relative(layer.step(next_BD[order], selected), expected_BD[order]) < 1e-12


@pytest.mark.parametrize("option", ["rope", "window-100"])
def test_a_sequence_that_outgrows_its_state_is_told_what_to_do(option: str) -> None:
    layer, x_BTD = build(option), tokens(1, 6)
    state = layer.init_state(1, 5)
    with pytest.raises(WorkbenchError, match=r"holds 5 tokens .* reaches 6: .*max_length"):
        layer(x_BTD, PLAIN, state)
    layer(x_BTD[:, :5], PLAIN, state)
    with pytest.raises(WorkbenchError, match="sliding_window"):
        layer.step(x_BTD[:, 5], state)
    assert state.length == 5


def test_a_prefix_in_a_later_call_is_refused() -> None:
    layer, x_BTD = build(), tokens(1, 6)
    state = layer.init_state(1, 6)
    layer(x_BTD[:, :3], PLAIN, state)
    with pytest.raises(WorkbenchError, match="first call"):
        layer(x_BTD[:, 3:], Context(prefix_lengths_B=torch.tensor([2])), state)


@pytest.mark.parametrize("length", [1, 5, 31])
@each_option
def test_flops_equal_those_counted_and_those_of_the_keys_seen(option: str, length: int) -> None:
    layer = build(option, dtype=torch.float32)
    costs = Attention.costs(D_MODEL, layer.config, length=length)
    after = Attention.costs(D_MODEL, layer.config, length=length + 1)
    assert costs.decode_state_bytes == after.state_bytes
    assert costs.decode_flops == after.forward_flops - costs.forward_flops

    with FlopCounterMode(display=False) as counter:
        layer(tokens(1, length, dtype=torch.float32))
    counted = counter.get_flop_counts()["Global"]
    linears = sum(counted.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    width = layer.q_proj.out_features
    window = layer.config.sliding_window or length
    core = sum(4 * width * min(position + 1, window) for position in range(length))
    assert costs.forward_flops == linears + core


@each_option
def test_bfloat16_is_close_to_float64(option: str) -> None:
    layer, x_BTD = build(option), tokens(2, 20)
    expected_BTD = layer(x_BTD)
    narrow = copy.deepcopy(layer).to(torch.bfloat16)
    actual_BTD, _ = cached(narrow, x_BTD.bfloat16(), [9])
    error_BTD = actual_BTD.double() - expected_BTD
    assert error_BTD.norm() / expected_BTD.norm() < 3e-2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed_BTD = layer.float()(x_BTD.float())
    assert (mixed_BTD.double() - expected_BTD).norm() / expected_BTD.norm() < 3e-2
