"""Which linears a decode step runs on the kernel for few rows, with which norms and residuals."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize

from workbench import linear_step
from workbench.linear_step import MAX_ROWS, FewRows, few_rows, fuse_norms, fuse_residuals


@pytest.fixture
def everywhere(monkeypatch):
    """The kernel is said to work on this device, and torch stands in for it."""
    monkeypatch.setattr(linear_step, "linear_step_backend", lambda *_: "triton")
    calls = []

    def stand_in(x_BD, weight_ND, bias_N, *others):
        assert others == (None, None, 0.0)
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


@pytest.fixture
def on_a_cpu():
    """The operator computes on a CPU, with torch."""

    def linear(x_BD, weight_ND, bias_N, residual_BN, norm_D, eps):
        if norm_D is not None:
            x_BD = nn.functional.rms_norm(x_BD, norm_D.shape, norm_D, eps)
        y_BN = nn.functional.linear(x_BD, weight_ND, bias_N)
        return y_BN if residual_BN is None else y_BN + residual_BN

    with torch.library._scoped_library("workbench", "IMPL") as library:
        library.impl("linear_step", linear, "CPU")
        yield


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


LINEAR = torch.ops.workbench.linear_step.default
NORM = torch.ops.workbench.norm_step.default


def fused(function, *inputs):
    """The graph of a function after the passes."""
    traced = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    fuse_norms(traced.graph)
    fuse_residuals(traced.graph)
    traced.graph.lint()
    traced.recompile()
    return traced


def calls_in(function, *inputs):
    """Of each call in the graph of a function whether it adds a residual, after the passes."""
    nodes = fused(function, *inputs).graph.find_nodes(op="call_function", target=LINEAR)
    return [node.args[3] is not None for node in nodes]


def test_a_residual_is_taken_in_where_nothing_else_reads_the_result():
    x, weight, wide = torch.randn(2, 8), torch.randn(8, 8), torch.randn(2, 8).double()

    def linear(x):
        return LINEAR(x, weight, None, None, None, 0.0)

    assert calls_in(lambda x: x + linear(x), x) == [True]
    assert calls_in(lambda x: linear(x) + x, x) == [True]
    assert calls_in(lambda x: linear(x) + linear(x * 2), x) in ([True, False], [False, True])
    assert calls_in(lambda x: torch.add(x, linear(x), alpha=2), x) == [False]
    assert calls_in(lambda x: linear(x) + 1, x) == [False]
    assert calls_in(lambda x: linear(x) + x[:1], x) == [False]
    assert calls_in(lambda x: linear(x) + wide, x) == [False]
    assert calls_in(lambda x: (x + (y := linear(x)), y), x) == [False]
    assert calls_in(lambda x: (y := linear(x)) + y, x) == [False]


WEIGHT, SCALE = torch.linspace(-1, 1, 64).view(8, 8), torch.linspace(0.5, 2, 8)


def normed(x):
    return NORM(x, SCALE, 0.1)


def times(x, weight=WEIGHT, residual=None):
    return LINEAR(x, weight, None, residual, None, 0.0)


@pytest.mark.parametrize(
    ("function", "norms", "plain"),
    [
        (lambda x: times(normed(x)), 1, 0),
        (lambda x: x + times(normed(x)), 1, 0),
        (lambda x: [times(y := normed(x)), times(y, WEIGHT.t().contiguous())], 2, 0),
        (lambda x: times(x) + (y := normed(x)) * times(y), 1, 1),
        (lambda x: times(normed(x)[:, None].reshape(3, 8)), 1, 0),
        (lambda x: times(normed(x).reshape(8, 3).t().contiguous(), WEIGHT), 0, 1),
        (lambda x: times(normed(x).reshape(6, 4), WEIGHT[:, :4].contiguous()), 0, 1),
        (lambda x: times(normed(x) * 2), 0, 1),
        # The norm of a norm, and a norm that is the residual.
        (lambda x: times(normed(normed(x))), 1, 1),
        (lambda x: (y := normed(x)) + times(x, residual=y), 0, 1),
        (lambda x: times(times(normed(x))), 1, 0),
    ],
)
def test_norms_are_taken_in_by_linears_and_are_torchs_elsewhere(on_a_cpu, function, norms, plain):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    traced = fused(function, x)
    nodes = traced.graph.find_nodes(op="call_function", target=LINEAR)
    assert sum(node.args[4] is not None for node in nodes) == norms
    roots = traced.graph.find_nodes(op="call_function", target=torch.ops.aten.rsqrt.default)
    assert (len(roots), NORM in [node.target for node in traced.graph.nodes]) == (plain, False)
    torch.testing.assert_close(traced(x), function(x))


def test_only_plain_norms_of_half_precision_rows_wait_for_a_linear(everywhere, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    calls = []

    def mark(x, weight, eps):
        calls.append((x.shape, eps))
        return nn.functional.rms_norm(x, weight.shape, weight, eps)

    monkeypatch.setattr(linear_step, "norm_step", mark)
    norms = {
        "plain": nn.RMSNorm(8, eps=0.1),
        "default": nn.RMSNorm(8),
        "bare": nn.RMSNorm(8, elementwise_affine=False),
        "wide": nn.RMSNorm((2, 8)),
        "long": nn.RMSNorm(linear_step.MAX_NORMED + 8),
        "layer": nn.LayerNorm(8),
    }
    model = nn.ModuleDict(norms)
    kinds = {name: type(module) for name, module in model.items()}
    x = torch.randn(2, 8)
    wanted = {name: norms[name](x) for name in ("plain", "default", "bare", "layer")}
    with few_rows(model, 2):
        changed = {name for name, module in model.items() if type(module) is not kinds[name]}
        assert changed == {"plain", "default"}
        for name, result in wanted.items():
            torch.testing.assert_close(model[name](x), result)
        model["plain"](x[None])
        with pytest.warns(UserWarning, match="Mismatch dtype"):  # torch's way
            model["plain"](x.bfloat16())
    assert calls == [((2, 8), 0.1), ((2, 8), torch.finfo(torch.float32).eps)]
    small, norm = torch.full((1, 8), 0.01, dtype=torch.bfloat16), nn.RMSNorm(8).bfloat16()
    wanted = norm(small)
    with few_rows(norm, 1):
        assert torch.equal(norm(small), wanted)
    assert {name: type(module) for name, module in model.items()} == kinds
