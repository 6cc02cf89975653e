"""The layer against transformers' mixtures with the same weights, and its losses against theirs.

Shape suffixes: B batch, T tokens, N = B·T, E experts, K experts a token, D d_model.
"""

from __future__ import annotations

from typing import Any

import _theirs
import pytest
import torch
from lm_moe import MixtureOfExperts, load_balance_loss, route, router_z_loss
from torch import Tensor, nn
from transformers import (
    GraniteMoeHybridConfig,
    JambaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
    GraniteMoeHybridMLP,
    GraniteMoeHybridMoE,
)
from transformers.models.jamba.modeling_jamba import JambaSparseMoeBlock
from transformers.models.mixtral.modeling_mixtral import (
    MixtralSparseMoeBlock,
    load_balancing_loss_func,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

from workbench.layer import Context

D_MODEL, EXPERTS, TOP_K, WIDTH, SHARED_WIDTH = 32, 6, 2, 24, 20
ROUTED: dict[str, Any] = {"num_experts": EXPERTS, "top_k": TOP_K, "intermediate_size": WIDTH}
SHAPE: dict[str, Any] = {
    "hidden_size": D_MODEL,
    "num_experts_per_tok": TOP_K,
    "experts_implementation": "eager",
}


class GraniteMixture(nn.Module):
    """What a Granite layer adds up after its second norm."""

    def __init__(self, config: GraniteMoeHybridConfig) -> None:
        super().__init__()
        self.block_sparse_moe = GraniteMoeHybridMoE(config)
        self.shared_mlp = GraniteMoeHybridMLP(config)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.block_sparse_moe(x_BTD) + self.shared_mlp(x_BTD)


def jamba() -> tuple[nn.Module, dict[str, Any]]:
    config = JambaConfig(**SHAPE, intermediate_size=WIDTH, num_experts=EXPERTS)
    return JambaSparseMoeBlock(config), {"router": "softmax"}


def mixtral() -> tuple[nn.Module, dict[str, Any]]:
    config = MixtralConfig(**SHAPE, intermediate_size=WIDTH, num_local_experts=EXPERTS)
    return MixtralSparseMoeBlock(config), {"router": "renormalized"}


def granite() -> tuple[nn.Module, dict[str, Any]]:
    config = GraniteMoeHybridConfig(
        **SHAPE,
        intermediate_size=WIDTH,
        num_local_experts=EXPERTS,
        shared_intermediate_size=SHARED_WIDTH,
        mamba_n_heads=8,
    )
    values = {"router": "topk_softmax", "shared_intermediate_size": SHARED_WIDTH}
    return GraniteMixture(config), values


def qwen3(norm_topk_prob: bool) -> tuple[nn.Module, dict[str, Any]]:
    config = Qwen3MoeConfig(
        **SHAPE,
        moe_intermediate_size=WIDTH,
        num_experts=EXPERTS,
        norm_topk_prob=norm_topk_prob,
    )
    router = "renormalized" if norm_topk_prob else "softmax"
    return Qwen3MoeSparseMoeBlock(config), {"router": router}


def qwen3_next() -> tuple[nn.Module, dict[str, Any]]:
    config = Qwen3NextConfig(
        **SHAPE,
        moe_intermediate_size=WIDTH,
        num_experts=EXPERTS,
        shared_expert_intermediate_size=SHARED_WIDTH,
        norm_topk_prob=True,
    )
    values = {"shared_intermediate_size": SHARED_WIDTH, "shared_gate": True}
    return Qwen3NextSparseMoeBlock(config), {"router": "renormalized", **values}


PAIRS = {
    "jamba": jamba,
    "mixtral": mixtral,
    "granite": granite,
    "qwen3": lambda: qwen3(True),
    "qwen3-not-renormalized": lambda: qwen3(False),
    "qwen3-next": qwen3_next,
}


def our_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    return _theirs.mixture(
        {name.removeprefix("block_sparse_moe."): tensor for name, tensor in theirs.items()}
    )


def relative(actual: Tensor | None, expected: Tensor | None) -> float:
    assert actual is not None
    assert expected is not None
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("name", PAIRS)
def test_outputs_and_gradients_equal_those_of_transformers(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs, values = PAIRS[name]()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.normal_(std=0.3)
        x_BTD = torch.randn(3, 11, D_MODEL)
    ours = MixtureOfExperts(D_MODEL, MixtureOfExperts.Config(**ROUTED, **values))
    ours.load_state_dict(our_names(theirs.state_dict()))
    our_x_BTD, their_x_BTD = x_BTD.clone().requires_grad_(), x_BTD.clone().requires_grad_()
    actual_BTD, expected_BTD = ours(our_x_BTD), theirs(their_x_BTD)
    actual_BTD.square().sum().backward()
    expected_BTD.square().sum().backward()
    assert relative(actual_BTD, expected_BTD) <= 1e-5
    assert relative(our_x_BTD.grad, their_x_BTD.grad) <= 1e-5
    gradients = our_names({key: value.grad for key, value in theirs.named_parameters()})
    for key, parameter in ours.named_parameters():
        assert relative(parameter.grad, gradients.pop(key)) <= 1e-5, key
    assert not gradients


def random_logits(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_load_balance_loss_is_that_of_transformers(top_k: int, masked: bool) -> None:
    mask_BT = torch.ones(2, 7, dtype=torch.bool)
    mask_BT[0, :4] = False
    logits_NE = random_logits(14, EXPERTS)
    ours_NE, theirs_NE = logits_NE.clone().requires_grad_(), logits_NE.clone().requires_grad_()
    _, chosen_NK = route(ours_NE, top_k, "softmax")
    actual = load_balance_loss(ours_NE, chosen_NK, mask_BT.flatten() if masked else None)
    expected = load_balancing_loss_func(
        (theirs_NE,), EXPERTS, top_k, mask_BT.long() if masked else None
    )
    actual.backward()
    expected.backward()
    assert relative(actual, expected) <= 1e-6
    assert relative(ours_NE.grad, theirs_NE.grad) <= 1e-5


def test_an_even_load_has_the_least_loss() -> None:
    logits_EE = torch.eye(EXPERTS)
    even = load_balance_loss(logits_EE, logits_EE.argmax(-1)[:, None])
    assert float(even) == pytest.approx(1.0)
    all_to_one = logits_EE[:1].expand(EXPERTS, -1) * 100
    worst = load_balance_loss(all_to_one, all_to_one.argmax(-1)[:, None])
    assert float(worst) == pytest.approx(EXPERTS)


def test_the_z_loss_is_the_mean_square_of_the_log_partition() -> None:
    logits_NE = random_logits(5, EXPERTS).double()
    expected = sum(float(row.exp().sum().log()) ** 2 for row in logits_NE) / 5
    assert float(router_z_loss(logits_NE)) == pytest.approx(expected)
    real_N = torch.tensor([True, True, False, True, False])
    expected = sum(float(row.exp().sum().log()) ** 2 for row in logits_NE[real_N]) / 3
    assert float(router_z_loss(logits_NE, real_N)) == pytest.approx(expected)


def collected(layer: MixtureOfExperts, x_BTD: Tensor, mask_BT: Tensor | None = None) -> list[float]:
    losses: list[Tensor] = []
    layer(x_BTD, Context(attention_mask_BT=mask_BT, losses=losses))
    return [float(loss.detach()) for loss in losses]


def test_losses_are_collected_weighted_and_over_real_tokens() -> None:
    config = MixtureOfExperts.Config(**ROUTED, aux_loss_weight=0.25, z_loss_weight=0.5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = MixtureOfExperts(D_MODEL, config)
        x_BTD = torch.randn(1, 9, D_MODEL)
    mask_BT = torch.ones(1, 9, dtype=torch.bool)
    mask_BT[:, :4] = False
    logits_NE = layer.router(x_BTD[0, 4:])
    _, chosen_NK = route(logits_NE, TOP_K, "renormalized")
    expected = [
        0.25 * float(load_balance_loss(logits_NE, chosen_NK).detach()),
        0.5 * float(router_z_loss(logits_NE).detach()),
    ]
    assert collected(layer, x_BTD, mask_BT) == pytest.approx(expected)
    assert collected(layer, x_BTD[:, 4:]) == pytest.approx(expected)
    assert collected(layer, x_BTD) != pytest.approx(expected)
    nothing = torch.zeros_like(mask_BT)
    assert collected(layer, x_BTD, nothing) == [0.0, 0.0]


def test_no_loss_is_computed_where_none_is_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr("lm_moe.load_balance_loss", fail)
    layer = MixtureOfExperts(D_MODEL, MixtureOfExperts.Config(**ROUTED))
    layer(torch.zeros(1, 2, D_MODEL))
    with pytest.raises(AssertionError, match="computed"):
        collected(layer, torch.zeros(1, 2, D_MODEL))


def test_weights_of_zero_add_no_loss() -> None:
    config = MixtureOfExperts.Config(**ROUTED, aux_loss_weight=0.0)
    assert collected(MixtureOfExperts(D_MODEL, config), torch.zeros(1, 2, D_MODEL)) == []
