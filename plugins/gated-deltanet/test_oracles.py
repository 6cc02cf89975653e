"""Gated DeltaNet against transformers' Qwen3-Next and OLMo Hybrid modules with the same weights.

Shape suffixes: B batch, T tokens, D d_model.
"""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_gated_deltanet import GatedDeltaNet, fuse_projections, gated_delta_rule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, OlmoHybridConfig, Qwen3NextConfig
from transformers.models.olmo_hybrid import modeling_olmo_hybrid
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet
from transformers.models.qwen3_next import modeling_qwen3_next
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from workbench.builder import Builder
from workbench.errors import FieldError
from workbench.layer import PLAIN, Context
from workbench.layout import Block, Layout

HERE = Path(__file__).parent
D_MODEL = 48
TOLERANCE = 1e-5  # of float32, relative to the largest value
# Their chunked form sums decays' logarithms in float32: against float64 the gradients of what makes
# the decays are off by up to 6e-5 there, by 2e-6 in the layer. Their recurrent form sums nothing.
DECAYS = ("A_log", "dt_bias", "in_proj_ba.weight")
DECAY_TOLERANCE = {"chunked": 1e-4, "recurrent": TOLERANCE}
SMALL: dict[str, Any] = {"num_k_heads": 2, "head_k_dim": 16, "head_v_dim": 24}
OPTIONS: dict[str, dict[str, Any]] = {
    "heads alike": SMALL,
    "more value heads": SMALL | {"num_v_heads": 6, "d_conv": 3, "chunk_size": 16},
    "negative eigenvalues": SMALL | {"num_v_heads": 4, "allow_neg_eigval": True},
}
LENGTHS = (1, 7, 64, 131)


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def linear_attention(config: Any) -> dict[str, Any]:
    return {
        "hidden_size": D_MODEL,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_attention_heads": 2,
        "linear_num_key_heads": config.num_k_heads,
        "linear_num_value_heads": config.heads,
        "linear_key_head_dim": config.head_k_dim,
        "linear_value_head_dim": config.head_v_dim,
        "linear_conv_kernel_dim": config.d_conv,
    }


def qwen3_next(values: dict[str, Any]) -> tuple[GatedDeltaNet, nn.Module, Any]:
    config = GatedDeltaNet.Config(**values)
    theirs = Qwen3NextConfig(**linear_attention(config), rms_norm_eps=config.norm_eps)
    reference = Qwen3NextGatedDeltaNet(theirs, layer_idx=0).eval()
    disturb(reference)
    layer = GatedDeltaNet(D_MODEL, config)
    layer.load_state_dict(reference.state_dict())
    return layer, reference, theirs


def olmo_hybrid(values: dict[str, Any]) -> tuple[GatedDeltaNet, nn.Module, Any]:
    config = GatedDeltaNet.Config(**values, norm_eps=1e-5)
    theirs = OlmoHybridConfig(
        **linear_attention(config), linear_allow_neg_eigval=config.allow_neg_eigval
    )
    reference = OlmoHybridGatedDeltaNet(theirs, layer_idx=0).eval()
    disturb(reference)
    layer = GatedDeltaNet(D_MODEL, config)
    layer.load_state_dict(fuse_projections(reference.state_dict(), config))
    return layer, reference, theirs


PAIRS = [
    pytest.param(qwen3_next, "heads alike", id="qwen3_next-heads alike"),
    pytest.param(qwen3_next, "more value heads", id="qwen3_next-more value heads"),
    pytest.param(olmo_hybrid, "heads alike", id="olmo_hybrid-heads alike"),
    pytest.param(olmo_hybrid, "more value heads", id="olmo_hybrid-more value heads"),
    pytest.param(olmo_hybrid, "negative eigenvalues", id="olmo_hybrid-negative eigenvalues"),
]


def disturb(module: nn.Module) -> None:
    """Weights for outputs of order one, none neutral and none equal to another."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.1 * noise)


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(actual: Tensor, expected: Tensor) -> float:
    difference = float((actual - expected).abs().max())
    # The decay of a lone token has no gradient at all.
    return difference and difference / float(expected.abs().max())


def in_our_order(layer: GatedDeltaNet, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """By our parameters' names, whichever of the two modules they come from."""
    return fuse_projections(tensors, layer.config) if "q_proj.weight" in tensors else tensors


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
@pytest.mark.parametrize(("pair", "options"), PAIRS)
def test_outputs_and_gradients(
    pair: Any, options: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "recurrent":
        for module in (modeling_qwen3_next, modeling_olmo_hybrid):
            theirs = module.torch_recurrent_gated_delta_rule
            monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", theirs)
    layer, reference, _ = pair(OPTIONS[options])
    for length in LENGTHS:
        x_BTD, weights_BTD = inputs(2, length, D_MODEL), inputs(2, length, D_MODEL, seed=1)
        results = []
        for module in (layer, reference):
            module.zero_grad()
            x = x_BTD.clone().requires_grad_()
            y = module(x)
            (y * weights_BTD).sum().backward()
            gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
            results.append((y.detach(), x.grad, in_our_order(layer, gradients)))
        (actual, actual_dx, actual_gradients), (expected, dx, gradients) = results
        assert relative(actual, expected) < TOLERANCE, f"length {length}"
        assert relative(actual_dx, dx) < TOLERANCE, f"length {length}"
        assert actual_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            tolerance = DECAY_TOLERANCE[form] if name in DECAYS else TOLERANCE
            assert relative(actual_gradients[name], gradient) < tolerance, f"{name} at {length}"


@torch.no_grad()
@pytest.mark.parametrize(("pair", "options"), PAIRS)
def test_cached_decoding(pair: Any, options: str) -> None:
    """A prompt, another prompt that continues it, then token by token, both with their caches."""
    layer, reference, config = pair(OPTIONS[options])
    x_BTD = inputs(2, 80, D_MODEL)
    cache, state = DynamicCache(config=config), layer.init_state(2, 80)
    for part_BTD in (x_BTD[:, :21], x_BTD[:, 21:71]):
        expected = reference(part_BTD, cache_params=cache)
        assert relative(layer(part_BTD, PLAIN, state), expected) < TOLERANCE
    for x_BD in x_BTD[:, 71:].unbind(1):
        expected = reference(x_BD[:, None], cache_params=cache)[:, 0]
        assert relative(layer.step(x_BD, state), expected) < TOLERANCE
    assert relative(state.delta_BHKV, cache.get_recurrent_state(0)) < TOLERANCE
    assert relative(state.conv_BCW, cache.get_conv_state(0)) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize(("pair", "options"), PAIRS)
def test_left_padding(pair: Any, options: str) -> None:
    layer, reference, _ = pair(OPTIONS[options])
    mask_BT = torch.arange(15) >= torch.tensor([[0], [6]])
    x_BTD = inputs(2, 15, D_MODEL)
    expected = reference(x_BTD, attention_mask=mask_BT.long())
    actual = layer(x_BTD, Context(attention_mask_BT=mask_BT))
    assert relative(actual[mask_BT], expected[mask_BT]) < TOLERANCE


@torch.no_grad()
def test_padding_leaves_the_matrix_state_as_it_is() -> None:
    layer, _, _ = qwen3_next(OPTIONS["more value heads"])
    x_BTD = inputs(2, 20, D_MODEL)
    padded, alone = layer.init_state(2, 20), layer.init_state(2, 20)
    layer(x_BTD, Context(attention_mask_BT=torch.arange(20).expand(2, -1) < 13), padded)
    layer(x_BTD[:, :13], PLAIN, alone)
    assert relative(padded.delta_BHKV, alone.delta_BHKV) < TOLERANCE


def literal_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The paper's equation, one sequence and head at a time, `[T, ...]`."""
    state_VK = v.new_zeros(v.shape[1], k.shape[1])
    outputs = []
    for t in range(len(q)):
        erase_KK = torch.eye(k.shape[1], dtype=k.dtype) - beta[t] * torch.outer(k[t], k[t])
        state_VK = g[t].exp() * state_VK @ erase_KK + beta[t] * torch.outer(v[t], k[t])
        outputs.append(state_VK @ q[t])
    return torch.stack(outputs)


@pytest.mark.parametrize("chunk_size", [1, 5, 16, 64])
@pytest.mark.parametrize("decay", [0.01, 300.0])
def test_any_chunk_size_gives_the_papers_equation(chunk_size: int, decay: float) -> None:
    """Decays so strong that they underflow, too, next to tokens that hardly decay."""
    k = F.normalize(inputs(1, 37, 1, 8, seed=1).double(), dim=-1)
    q, v = inputs(1, 37, 1, 8, seed=2).double(), inputs(1, 37, 1, 6, seed=3).double()
    beta = 2 * inputs(1, 37, 1, seed=4).double().sigmoid()
    g = torch.where(torch.arange(37) % 5 == 0, -decay, -1e-3).double()[None, :, None]
    expected = literal_rule(q[0, :, 0], k[0, :, 0], v[0, :, 0], g[0, :, 0], beta[0, :, 0])
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        arguments = (part.to(dtype) for part in (q, k, v, g, beta))
        actual, _ = gated_delta_rule(*arguments, chunk_size=chunk_size)
        assert actual.dtype == dtype
        assert relative(actual[0, :, 0], expected) < tolerance


@torch.no_grad()
@pytest.mark.parametrize("options", list(OPTIONS))
@pytest.mark.parametrize("length", [40, 130])
def test_flops_are_those_that_torch_counts(options: str, length: int) -> None:
    config = GatedDeltaNet.Config(**OPTIONS[options])
    layer = GatedDeltaNet(D_MODEL, config)
    layer.reset_parameters()
    with FlopCounterMode(display=False) as counter:
        layer(inputs(1, length, D_MODEL))
    costs = GatedDeltaNet.costs(D_MODEL, config, length=length)
    # What torch does not count: the convolution, and the triangular systems.
    convolution = 2 * config.d_conv * config.conv_dim
    size = min(config.chunk_size, length)
    system = config.heads * size * (size - 1) * (config.head_k_dim + config.head_v_dim)
    uncounted = convolution * length + system * math.ceil(length / size)
    assert costs.forward_flops == counter.get_total_flops() + uncounted

    with FlopCounterMode(display=False) as counter:
        layer.step(inputs(1, D_MODEL), layer.init_state(1, 1))
    # And of a step: the state's decay (1 each) and the write (2 each).
    state = config.heads * config.head_k_dim * config.head_v_dim
    assert costs.decode_flops == counter.get_total_flops() + convolution + 3 * state


def test_initial_values_are_those_published() -> None:
    layer = GatedDeltaNet(8, GatedDeltaNet.Config(num_k_heads=2000, head_k_dim=1, head_v_dim=1))
    layer.reset_parameters()
    steps = F.softplus(layer.dt_bias)
    assert 0.999e-3 < steps.min() < 1.1e-3
    assert 0.09 < steps.max() < 0.1001
    assert steps.median().item() == pytest.approx(0.01, rel=0.15)
    rates = layer.A_log.exp()
    assert 0.009 < rates.min() < 0.05
    assert rates.mean().item() == pytest.approx(8, rel=0.05)
    assert (layer.norm.weight == 1).all()


@pytest.mark.parametrize("heads", [3, 6])
def test_value_heads_that_key_heads_do_not_divide_are_refused(heads: int) -> None:
    config = GatedDeltaNet.Config(num_k_heads=4, num_v_heads=heads)
    with pytest.raises(FieldError) as error:
        GatedDeltaNet.check(D_MODEL, config)
    assert error.value.field == "num_v_heads"
    works = int(error.value.message.split(": ")[1].split()[0])
    GatedDeltaNet.check(D_MODEL, dataclasses.replace(config, num_v_heads=works))


RELOAD = """
import sys, torch, transformers
from safetensors.torch import load_file, save_file
sys.modules["workbench"] = sys.modules["lm_gated_deltanet"] = sys.modules["workbench_mamba"] = None
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = load_file(sys.argv[2])["tokens"]
given = model.generate(tokens[:, :9], attention_mask=torch.ones_like(tokens[:, :9]),
                       do_sample=False, max_new_tokens=8)
save_file({"logits": model(tokens).logits.detach(), "greedy": given}, sys.argv[3])
"""


@pytest.mark.slow
def test_an_exported_model_needs_neither_the_workbench_nor_this_package(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    builder = Builder.load([HERE])
    blocks = (Block(layer="gated-deltanet", config=OPTIONS["more value heads"]),) * 2
    model = builder.build(Layout(d_model=D_MODEL, vocab_size=61, blocks=blocks), seed=1)
    folder, question, answer = tmp_path / "model", tmp_path / "question", tmp_path / "answer"
    builder.exporters["huggingface"].export(
        model, builder, folder, None, {"study": "s", "trial": 0, "metrics": {}, "units": {}}
    )
    tokens = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(2))
    save_file({"tokens": tokens}, question)
    done = subprocess.run(
        [sys.executable, "-I", "-c", RELOAD, folder, question, answer],
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = load_file(answer)
    with torch.inference_mode():
        assert relative(seen["logits"], model.eval()(tokens)) < TOLERANCE
        states = model.init_state(2, 17)
        greedy = [model.prefill(tokens[:, :9], states).argmax(-1)]
        while len(greedy) < 8:
            greedy.append(model.step(greedy[-1], states).argmax(-1))
    assert seen["greedy"][:, 9:].tolist() == torch.stack(greedy, 1).tolist()
