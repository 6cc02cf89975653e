"""Which linears a decode step runs on the kernel for few rows, and which residuals it takes in."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize

from workbench import linear_step
from workbench.linear_step import MAX_ROWS, FewRows, few_rows, fuse_residuals


@pytest.fixture
def everywhere(monkeypatch):
    """The kernel is said to work on this device, and torch stands in for it."""
    monkeypatch.setattr(linear_step, "linear_step_backend", lambda *_: "triton")
    calls = []

    def stand_in(x_BD, weight_ND, bias_N, residual_BN):
        calls.append(x_BD.shape)
        return nn.functional.linear(x_BD, weight_ND, bias_N)

    monkeypatch.setattr(linear_step, "linear_step", stand_in)
    return calls


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Negative(nn.Module):
    def forward(self, weight):
        return -weight


def make():
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("plain", "hooked", "turned", "own")})
    model["doubled"] = Doubled(8, 8)
    model["hooked"].register_forward_hook(lambda module, inputs, output: output + 1)
    parametrize.register_parametrization(model["turned"], "weight", Negative())
    model["own"].forward = lambda x: x
    return model


def test_only_plain_linears_change_and_all_compute_what_they_did(everywhere):
    model = make()
    kinds = {name: type(module) for name, module in model.items()}
    x = torch.randn(2, 3, 8)[:, 0]
    wanted = {name: module(x) for name, module in model.items()}
    with few_rows(model, 2):
        changed = {name for name, module in model.items() if type(module) is not kinds[name]}
        assert changed == {"plain"}
        for name, module in model.items():
            torch.testing.assert_close(module(x), wanted[name])
    assert everywhere == [(2, 8)]
    assert {name: type(module) for name, module in model.items()} == kinds


def test_rows_are_counted_over_all_leading_dimensions(everywhere):
    model = nn.Sequential(nn.Linear(8, 8))
    with few_rows(model, 1):
        assert type(model[0]) is FewRows
        for shape in ((MAX_ROWS, 8), (2, 1, 8), (MAX_ROWS + 1, 8), (2, MAX_ROWS, 8), (0, 8)):
            x = torch.randn(shape)
            assert model(x).shape == shape
    assert everywhere == [(MAX_ROWS, 8), (2, 8)]
    with few_rows(model, MAX_ROWS + 1):
        assert type(model[0]) is nn.Linear


def test_linears_come_back_after_an_error(everywhere):
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ZeroDivisionError), few_rows(model, 1):
        1 / 0  # noqa: B018
    assert type(model[0]) is nn.Linear


def test_a_cpu_changes_nothing():
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16))
    with few_rows(model, 1):
        assert type(model[0]) is nn.Linear


def calls_in(function, *inputs):
    """The operator's residuals in the graph of a function, after the pass."""
    traced = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    graph = traced.graph
    fuse_residuals(graph)
    graph.lint()
    op = torch.ops.workbench.linear_step.default
    return [node.args[3] is not None for node in graph.nodes if node.target is op]


def test_a_residual_is_taken_in_where_nothing_else_reads_the_result():
    op = torch.ops.workbench.linear_step.default
    x, weight, wide = torch.randn(2, 8), torch.randn(8, 8), torch.randn(2, 8).double()

    def linear(x):
        return op(x, weight, None, None)

    assert calls_in(lambda x: x + linear(x), x) == [True]
    assert calls_in(lambda x: linear(x) + x, x) == [True]
    assert calls_in(lambda x: linear(x) + linear(x * 2), x) in ([True, False], [False, True])
    assert calls_in(lambda x: torch.add(x, linear(x), alpha=2), x) == [False]
    assert calls_in(lambda x: linear(x) + 1, x) == [False]
    assert calls_in(lambda x: linear(x) + x[:1], x) == [False]
    assert calls_in(lambda x: linear(x) + wide, x) == [False]
    assert calls_in(lambda x: (x + (y := linear(x)), y), x) == [False]
    assert calls_in(lambda x: (y := linear(x)) + y, x) == [False]
