"""Dispatch: only chosen experts work, exactly the counted FLOPs, the same bits, one graph.

Shape suffixes: B batch, T tokens, N = B·T, D d_model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lm_moe import MixtureOfExperts, route
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from workbench.builder import Builder
from workbench.errors import FieldError
from workbench.layer import Context, State
from workbench.layout import Block, Layout
from workbench.training import TrainingConfig, make_optimizers
from workbench_mlp.swiglu import SwiGLU
from workbench_quantizers.groupwise import GroupwiseLinear, Int8

D_MODEL = 32
SMALL: dict[str, Any] = {"num_experts": 8, "top_k": 2, "intermediate_size": 24}
QWEN: dict[str, Any] = {**SMALL, "shared_intermediate_size": 20, "shared_gate": True}


def build(seed: int = 0, d_model: int = D_MODEL, **values: Any) -> MixtureOfExperts:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MixtureOfExperts(d_model, MixtureOfExperts.Config(**values))


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def experts_called(layer: MixtureOfExperts) -> Iterator[list[int]]:
    """Numbers of the experts that ran, in order."""
    called: list[int] = []
    hooks = [
        expert.register_forward_hook(lambda *_, index=index: called.append(index))
        for index, expert in enumerate(layer.experts)
    ]
    yield called
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_a_decode_step_runs_the_chosen_experts_alone() -> None:
    layer = build(**SMALL)
    for seed in range(5):
        x_BD = inputs(1, D_MODEL, seed=seed)
        chosen = layer.router(x_BD).topk(2).indices[0].tolist()
        with experts_called(layer) as called:
            layer.step(x_BD, State())
        assert called == sorted(chosen)


@torch.no_grad()
def test_a_batched_step_runs_each_chosen_expert_once() -> None:
    layer = build(**SMALL)
    x_BD = inputs(3, D_MODEL)
    chosen = layer.router(x_BD).topk(2).indices
    with experts_called(layer) as called:
        layer.step(x_BD, State())
    assert called == sorted(set(chosen.flatten().tolist()))


def test_in_training_an_expert_that_nobody_chose_has_a_gradient_of_zero() -> None:
    layer = build(**SMALL)
    x_BTD = inputs(1, 1, D_MODEL)
    chosen = layer.router(x_BTD).topk(2).indices.flatten().tolist()
    layer(x_BTD).sum().backward()
    for index, expert in enumerate(layer.experts):
        gradient = expert.down_proj.weight.grad
        assert bool(gradient.any()) == (index in chosen)


@pytest.mark.parametrize(
    "values",
    [SMALL, QWEN, {**SMALL, "top_k": 5}, {**SMALL, "top_k": 1, "router": "softmax"}, {}],
    ids=["routed", "shared-gated", "top-5", "top-1", "defaults"],
)
def test_flops_are_those_counted_whatever_the_routing(values: dict[str, Any]) -> None:
    for seed in range(3):
        layer = build(seed, **values)
        costs = layer.costs(D_MODEL, layer.config, length=13)
        with FlopCounterMode(display=False) as counter:
            layer(inputs(1, 13, D_MODEL, seed=seed))
        assert costs.forward_flops == counter.get_total_flops()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            layer.step(inputs(1, D_MODEL, seed=seed), State())
        assert costs.decode_flops == counter.get_total_flops()


@pytest.mark.parametrize("values", [SMALL, QWEN], ids=["routed", "shared-gated"])
def test_active_parameters_are_those_that_a_token_touches(values: dict[str, Any]) -> None:
    layer = build(**values)
    layer.step(inputs(1, D_MODEL), State()).square().sum().backward()
    touched = sum(p.numel() for p in layer.parameters() if p.grad is not None and p.grad.any())
    assert layer.costs(D_MODEL, layer.config, length=1).active_parameters == touched


@torch.no_grad()
@pytest.mark.parametrize("router", ["renormalized", "topk_softmax"])
def test_equal_experts_are_one_swiglu(router: str) -> None:
    layer = build(**SMALL, router=router)
    for expert in layer.experts:
        expert.load_state_dict(layer.experts[0].state_dict())
    x_BTD = inputs(2, 7, D_MODEL)
    torch.testing.assert_close(layer(x_BTD), layer.experts[0](x_BTD))


@torch.no_grad()
def test_with_all_experts_chosen_it_is_their_weighted_sum() -> None:
    layer = build(**SMALL | {"top_k": 8, "router": "softmax"})
    x_BTD = inputs(2, 7, D_MODEL)
    shares = layer.router(x_BTD).softmax(-1)
    expected = sum(shares[..., [i]] * expert(x_BTD) for i, expert in enumerate(layer.experts))
    torch.testing.assert_close(layer(x_BTD), expected)


def test_renormalized_and_topk_softmax_differ_by_rounding_alone() -> None:
    logits = inputs(50, 8).double()
    first, second = (route(logits, 3, router) for router in ("renormalized", "topk_softmax"))
    torch.testing.assert_close(first, second)
    assert (route(logits, 3, "softmax")[0].sum(-1) < 0.99).all()


def test_gradients_have_the_same_bits_with_several_threads() -> None:
    """Large enough for torch to spread an indexed sum over threads, in whatever order they come."""
    layer = build(d_model=128, num_experts=4, top_k=4, intermediate_size=8)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = []
        for _ in range(5):
            x_BTD = inputs(2, 600, 128).requires_grad_()
            y_BTD = layer(x_BTD)
            runs.append((y_BTD, *torch.autograd.grad(y_BTD.square().sum(), x_BTD)))
    finally:
        torch.set_num_threads(before)
    for y_BTD, gradient_BTD in runs[1:]:
        assert torch.equal(y_BTD, runs[0][0])
        assert torch.equal(gradient_BTD, runs[0][1])


def test_the_router_computes_in_its_weights_precision_under_autocast() -> None:
    layer = build(**SMALL)
    seen: list[Tensor] = []
    layer.router.register_forward_hook(lambda _, __, logits: seen.append(logits))
    x_BTD = inputs(2, 7, D_MODEL)
    layer(x_BTD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_BTD = layer(x_BTD)
    assert y_BTD.dtype == torch.bfloat16
    assert torch.equal(seen[0], seen[1])


def run(layer: Any, x_BTD: Tensor) -> list[Tensor]:
    losses: list[Tensor] = []
    y_BTD = layer(x_BTD, Context(losses=losses))
    gradients = torch.autograd.grad(y_BTD.square().sum() + sum(losses), list(layer.parameters()))
    return [y_BTD, *losses, *gradients]


@torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True)
def test_it_compiles_into_one_graph_with_its_losses() -> None:
    layer = build(**QWEN | {"num_experts": 3}, z_loss_weight=0.1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for length in (5, 9):
        x_BTD = inputs(2, length, D_MODEL)
        expected, actual = run(layer, x_BTD), run(compiled, x_BTD)
        assert len(actual) == len(expected)
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_quantizers_take_the_experts_and_leave_the_router() -> None:
    layer = build(**QWEN)
    report = Int8.quantize(layer, Int8.Config(group_size=32))
    linears = {f"experts.{i}.{name}_proj" for i in range(8) for name in ("gate", "up", "down")}
    linears |= {f"shared_expert.{name}_proj" for name in ("gate", "up", "down")}
    assert set(report.quantized) == linears
    assert report.kept == dict(MixtureOfExperts.keep_precision)
    assert isinstance(layer.experts[3].up_proj, GroupwiseLinear)


def test_muon_takes_every_experts_matrices(builder_with_moe: Builder) -> None:
    layout = Layout(d_model=D_MODEL, vocab_size=16, blocks=(Block(layer="moe", config=SMALL),))
    model = builder_with_moe.build(layout)
    _, muon = make_optimizers(model, TrainingConfig(tokens=10**4))
    assert isinstance(muon, torch.optim.Muon)
    theirs = {id(p) for group in muon.param_groups for p in group["params"]}
    assert theirs == {id(p) for p in model.layers[0].parameters()}


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"num_experts": 0}, "num_experts"),
        ({"top_k": 0}, "top_k"),
        ({"num_experts": 2, "top_k": 4}, "top_k"),
        ({"top_k": 1}, "router"),
        ({"intermediate_size": 0}, "intermediate_size"),
        ({"expand": 0.0}, "expand"),
        ({"shared_intermediate_size": 0}, "shared_intermediate_size"),
        ({"shared_expand": -1.0}, "shared_expand"),
        ({"shared_gate": True}, "shared_gate"),
        ({"aux_loss_weight": -0.1}, "aux_loss_weight"),
        ({"z_loss_weight": -0.1}, "z_loss_weight"),
    ],
)
def test_what_cannot_work_is_refused_by_field(values: dict[str, Any], field: str) -> None:
    with pytest.raises(FieldError) as caught:
        MixtureOfExperts.check(D_MODEL, MixtureOfExperts.Config(**values))
    assert caught.value.field == field


def test_an_expert_is_as_wide_as_a_swiglu_of_the_same_config() -> None:
    config = MixtureOfExperts.Config(expand=1.3, multiple_of=8, shared_expand=0.7)
    layer = MixtureOfExperts(100, config, device="meta")
    alone = SwiGLU(100, SwiGLU.Config(expand=1.3, multiple_of=8), device="meta")
    assert layer.experts[0].up_proj.weight.shape == alone.up_proj.weight.shape == (136, 100)
    assert layer.shared_expert.up_proj.weight.shape == (72, 100)
