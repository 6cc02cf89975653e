"""RWKV-7 against the paper's equations, token by token, and against its authors' package.

Shape suffixes: B batch, T tokens, D d_model, N head width.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_rwkv7 import RWKV7, rwkv7
from lm_rwkv7_channel_mix import ChannelMix
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from workbench.builder import Builder
from workbench.errors import FieldError
from workbench.layer import PLAIN, Context
from workbench.layout import Block, Layout
from workbench.model import HybridLM

HERE = Path(__file__).parent
D_MODEL, VOCAB, LENGTH = 48, 61, 70
TOLERANCE = 1e-5  # of float32, relative to the largest value
SMALL = {
    "head_dim": 16,
    "decay_low_rank_dim": 7,
    "a_low_rank_dim": 6,
    "v_low_rank_dim": 5,
    "gate_low_rank_dim": 8,
}
TIME, CHANNEL = Block(layer="rwkv7", config=SMALL), Block(layer="rwkv7-channel-mix")
LAYOUT = Layout(
    d_model=D_MODEL,
    vocab_size=VOCAB,
    blocks=(TIME, CHANNEL) * 3,
    norm="layernorm",
    tie_embeddings=False,
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def builder() -> Builder:
    return Builder.load([HERE])


@pytest.fixture
def model(builder: Builder) -> HybridLM:
    """Three time mixes and three channel mixes, float32, no weight neutral."""
    model = builder.build(LAYOUT, seed=1).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.1
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(2))


def relative(actual: Tensor, expected: Tensor) -> float:
    difference = float((actual - expected).abs().max())
    return difference and difference / float(expected.abs().max())


# The paper's equations (section 4 and appendix), one token and one head at a time


def literal_time_mix(p: dict[str, Tensor], x_TD: Tensor, first_TD: Tensor | None) -> Any:
    """Outputs and the value before it is mixed; `p` by the checkpoints' names."""
    heads, n = p["r_k"].shape
    p = {name: weight.squeeze() for name, weight in p.items()} | {"r_k": p["r_k"]}
    states = [x_TD.new_zeros(n, n) for _ in range(heads)]  # value by key
    before, outputs, values = torch.zeros_like(x_TD[0]), [], []
    for t, x in enumerate(x_TD):
        xr, xw, xk, xv, xa, xg = (x + (before - x) * p[f"x_{name}"] for name in "rwkvag")
        before = x
        r, k, v = p["receptance.weight"] @ xr, p["key.weight"] @ xk, p["value.weight"] @ xv
        values.append(v)
        d = p["w0"] + p["w2"].T @ torch.tanh(p["w1"].T @ xw)
        w = torch.exp(-math.exp(-0.5) / (1 + torch.exp(-d)))
        a = 1 / (1 + torch.exp(-(p["a0"] + p["a2"].T @ (p["a1"].T @ xa))))
        g = p["g2"].T @ (1 / (1 + torch.exp(-(p["g1"].T @ xg))))
        if first_TD is not None:
            share = 1 / (1 + torch.exp(-(p["v0"] + p["v2"].T @ (p["v1"].T @ xv))))
            v = (1 - share) * v + share * first_TD[t]
        removal, k = k * p["k_k"], k * (1 + (a - 1) * p["k_a"])
        parts = []
        for h in range(heads):
            one = slice(h * n, (h + 1) * n)
            kappa = removal[one] / removal[one].norm()
            transition = torch.diag(w[one]) - torch.outer(kappa, a[one] * kappa)
            states[h] = states[h] @ transition + torch.outer(v[one], k[one])
            y = states[h] @ r[one]
            y = (y - y.mean()) / (y.var(correction=0) + 64e-5).sqrt()
            y = y * p["ln_x.weight"][one] + p["ln_x.bias"][one]
            parts.append(y + (r[one] * p["r_k"][h] * k[one]).sum() * v[one])
        outputs.append(p["output.weight"] @ (torch.cat(parts) * g))
    return torch.stack(outputs), torch.stack(values)


def literal_channel_mix(p: dict[str, Tensor], x_TD: Tensor) -> Tensor:
    before, outputs = torch.zeros_like(x_TD[0]), []
    for x in x_TD:
        mixed = x + (before - x) * p["x_k"].squeeze()
        outputs.append(p["value.weight"] @ (p["key.weight"] @ mixed).clamp(min=0) ** 2)
        before = x
    return torch.stack(outputs)


def literal_model(model: HybridLM, tokens_T: Tensor) -> Tensor:
    """Logits `[T, V]`; later time mixes take in the first one's value."""
    x_TD, first_TD = model.embedding.weight[tokens_T], None
    for block in model.blocks:
        p = dict(block.layer.named_parameters())
        normed_TD = block.norm(x_TD)
        if "r_k" in p:
            y_TD, value_TD = literal_time_mix(p, normed_TD, first_TD)
            first_TD = value_TD if first_TD is None else first_TD
        else:
            y_TD = literal_channel_mix(p, normed_TD)
        x_TD = x_TD + y_TD
    return F.linear(model.norm_f(x_TD), model.lm_head.weight)


def gradients_of(model: HybridLM) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p, dtype=torch.float64) if p.grad is None else p.grad.double()
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, TOLERANCE)]
)
def test_a_whole_model_is_the_papers_equations(
    model: HybridLM, dtype: torch.dtype, tolerance: float
) -> None:
    """Outputs and the gradient of every parameter; float32 is held against float64."""
    ids = tokens(1, LENGTH)
    weights_TV = inputs(LENGTH, VOCAB).double()
    results = []
    for compute, precision in ((lambda m: m(ids)[0], dtype), (None, torch.float64)):
        model.to(precision).zero_grad()
        logits_TV = literal_model(model, ids[0]) if compute is None else compute(model)
        (logits_TV * weights_TV.to(precision)).sum().backward()
        results.append((logits_TV.detach().double(), gradients_of(model)))
    (actual, actual_gradients), (expected, gradients) = results
    assert relative(actual, expected) < tolerance
    assert not gradients["blocks.0.layer.v0"].any(), "the first block has nothing to mix in"
    for name, gradient in gradients.items():
        assert relative(actual_gradients[name], gradient) < tolerance, name


@torch.no_grad()
def test_decoding_is_the_papers_equations(model: HybridLM) -> None:
    """A prompt, another that continues it, then token by token."""
    ids = tokens(2, LENGTH)
    expected = torch.stack([literal_model(model, row) for row in ids])
    states = model.init_state(2, LENGTH)
    logits = [model(ids[:, :9], states=states), model(ids[:, 9:60], states=states)]
    logits += [model.step(ids[:, t], states)[:, None] for t in range(60, LENGTH)]
    assert relative(torch.cat(logits, 1), expected) < TOLERANCE


@torch.no_grad()
def test_padding_leaves_the_matrix_state_as_it_is(model: HybridLM) -> None:
    layer, x_BTD = model.layers[0], inputs(2, 20, D_MODEL)
    padded, alone = layer.init_state(2, 20), layer.init_state(2, 20)
    layer(x_BTD, Context(attention_mask_BT=torch.arange(20).expand(2, -1) < 13), padded)
    layer(x_BTD[:, :13], PLAIN, alone)
    assert relative(padded.wkv_BHKV, alone.wkv_BHKV) < TOLERANCE


@pytest.mark.parametrize("log_w", [-math.exp(-0.5), -1e-3])
@pytest.mark.parametrize("chunk_size", [1, 5, 16, 64])
def test_any_chunk_size_gives_the_recurrence(log_w: float, chunk_size: int) -> None:
    """At the strongest decay that there is, too, in chunks as long as they may be."""
    r, k, v = (inputs(1, 130, 1, 8, seed=seed).double() for seed in range(3))
    kappa = F.normalize(inputs(1, 130, 1, 8, seed=3).double(), dim=-1)
    b = kappa * inputs(1, 130, 1, 8, seed=4).double().sigmoid()
    decay = torch.full_like(r, log_w)
    state, expected = torch.zeros(8, 8, dtype=torch.float64), []
    for t in range(130):
        row = {name: x[0, t, 0] for name, x in zip("rkvab", (r, k, v, -kappa, b), strict=True)}
        state = math.exp(log_w) * state + torch.outer(state @ row["a"], row["b"])
        state = state + torch.outer(row["v"], row["k"])
        expected.append(state @ row["r"])
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, TOLERANCE)):
        arguments = (part.to(dtype) for part in (r, decay, k, v, -kappa, b))
        actual, last = rwkv7(*arguments, chunk_size=chunk_size)
        assert relative(actual[0, :, 0], torch.stack(expected)) < tolerance
        assert relative(last[0, 0], state.T) < tolerance


def checkpoint(model: HybridLM) -> dict[str, Tensor]:
    """The model as the authors save theirs."""
    norm, kinds = {0: "ln1", 1: "ln2"}, {0: "att", 1: "ffn"}
    result = {"emb.weight": model.embedding.weight, "head.weight": model.lm_head.weight}
    modules = {"blocks.0.ln0": model.blocks[0].norm, "ln_out": model.norm_f}
    for index, block in enumerate(model.blocks):
        modules[f"blocks.{index // 2}.{norm[index % 2]}"] = block.norm
        modules[f"blocks.{index // 2}.{kinds[index % 2]}"] = block.layer
    for prefix, module in modules.items():
        result |= {f"{prefix}.{name}": value for name, value in module.state_dict().items()}
    return {name: value.detach().clone() for name, value in result.items()}


@pytest.mark.skipif(importlib.util.find_spec("rwkv") is None, reason="needs pip install rwkv")
@torch.no_grad()
def test_logits_are_those_of_the_authors_package(model: HybridLM, tmp_path: Path) -> None:
    """Whole, and continued token by token; in a process of its own, as it sets globals of torch."""
    torch.save(checkpoint(model), tmp_path / "model.pth")
    ids = tokens(1, LENGTH)
    done = subprocess.run(
        [sys.executable, HERE / "_rwkv_probe.py", tmp_path / "model", tmp_path / "answer"],
        input=" ".join(map(str, ids[0].tolist())),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = load_file(tmp_path / "answer")
    # Theirs norms the embedding before the first block.
    model.embedding.weight.copy_(model.blocks[0].norm(model.embedding.weight))
    expected = model(ids)[0]
    assert relative(seen["whole"], expected) < TOLERANCE
    assert relative(seen["continued"], expected[-len(seen["continued"]) :]) < TOLERANCE


# Structure, costs, initial values


def test_the_first_time_mix_is_the_source_of_the_others(builder: Builder) -> None:
    alone = Block(layer="rwkv7", config=SMALL | {"value_residual": False})
    layout = LAYOUT.replace(blocks=(CHANNEL, alone, TIME, CHANNEL, alone, TIME))
    assert builder.sources(builder.resolve(layout)) == [None, None, 1, None, None, 1]


def test_the_published_size_is_counted(builder: Builder) -> None:
    """The paper's formula for 12 blocks of 768, but for the norm of the embedding."""
    first = Block(layer="rwkv7", config={"value_residual": False})
    others = (Block(layer="rwkv7"), CHANNEL) * 11
    layout = Layout(
        d_model=768,
        vocab_size=65536,
        blocks=(first, CHANNEL, *others),
        norm="layernorm",
        tie_embeddings=False,
    )
    d, vocab, depth, low_ranks, v_rank = 768, 65536, 12, 64 + 64 + 32 + 128, 32
    published = 2 * d * vocab + 4 * d + depth * d * (12 * d + 2 * low_ranks + 19)
    published -= 2 * d * v_rank + d
    assert published == 191_034_624
    assert builder.costs(layout, length=1).total.parameters == published - 2 * d
    assert builder.build(layout, device="meta").num_parameters == published - 2 * d


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 40, 130])
def test_flops_are_those_that_torch_counts(length: int) -> None:
    config = RWKV7.Config(**SMALL)
    layer = RWKV7(D_MODEL, config)
    layer.reset_parameters()
    with FlopCounterMode(display=False) as counter:
        layer(inputs(1, length, D_MODEL))
    costs = RWKV7.costs(D_MODEL, config, length=length)
    # What torch does not count: triangular systems, and of one token the state's decay and writes.
    chunks, size = math.ceil(length / 32), min(length, 32)
    state = D_MODEL * config.head_dim
    uncounted = 5 * state if length == 1 else chunks * 2 * size * (size - 1) * D_MODEL
    assert costs.forward_flops == counter.get_total_flops() + uncounted
    assert costs.decode_flops == RWKV7.costs(D_MODEL, config, length=1).forward_flops

    mlp = ChannelMix(D_MODEL, ChannelMix.Config())
    mlp.reset_parameters()
    with FlopCounterMode(display=False) as counter:
        mlp(inputs(1, length, D_MODEL))
    costs = ChannelMix.costs(D_MODEL, ChannelMix.Config(), length=length)
    assert costs.forward_flops == counter.get_total_flops()


def test_initial_values_are_those_published() -> None:
    """Computed here as the authors' training code does, a channel at a time, for block 5 of 12."""
    torch.manual_seed(0)
    layer = RWKV7(128, RWKV7.Config(depth=0.5))
    layer.reset_parameters()
    for n in (0, 1, 63, 64, 100, 127):
        linear, zigzag = n / 127 - 0.5, ((n % 64) - 31.5) / 31.5
        zigzag *= abs(zigzag)
        expected = {
            "x_r": 1 - (n / 128) ** (0.2 * 0.5),
            "x_k": 1 - (n / 128) ** (0.7 * 0.5),
            "w0": -6 + 6 * (n / 127) ** (1 + 0.5**0.3) + 0.5 + zigzag * 2.5,
            "a0": -0.19 + zigzag * 0.3 + linear * 0.4,
            "v0": 0.73 - linear * 0.4,
            "k_k": 0.71 - linear * 0.1,
            "k_a": 1.02,
        }
        for name, value in expected.items():
            assert layer.get_parameter(name)[0, 0, n].item() == pytest.approx(value, abs=1e-5), name
    gram = layer.w2 @ layer.w2.T
    torch.testing.assert_close(gram, 0.01 * torch.eye(len(gram)), atol=1e-6, rtol=0)
    assert not layer.output.weight.any()
    assert not layer.w1.any()
    assert layer.key.weight.abs().max() <= 0.05 / 128**0.5 < 1.01 * layer.key.weight.abs().max()


@pytest.mark.parametrize(
    ("field", "value", "works"),
    [
        ("head_dim", 7, 8),
        ("head_dim", 64, 48),
        ("head_dim", 1, 2),
        ("chunk_size", 65, 64),
        ("a_low_rank_dim", 0, 1),
        ("depth", 0.0, 0.1),
        ("norm_eps", 0.0, 1e-5),
    ],
)
def test_what_cannot_be_built_is_refused(field: str, value: Any, works: Any) -> None:
    with pytest.raises(FieldError) as error:
        RWKV7.check(D_MODEL, RWKV7.Config(**{**SMALL, field: value}))
    assert error.value.field == field
    if field == "head_dim":
        assert f": {works} does" in error.value.message
    RWKV7.check(D_MODEL, RWKV7.Config(**{**SMALL, field: works}))


RELOAD = """
import sys, torch, transformers
from safetensors.torch import load_file, save_file
for name in ("workbench", "lm_rwkv7", "lm_rwkv7_channel_mix", "workbench_mamba"):
    sys.modules[name] = None
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = load_file(sys.argv[2])["tokens"]
given = model.generate(tokens[:, :9], attention_mask=torch.ones_like(tokens[:, :9]),
                       do_sample=False, max_new_tokens=8)
save_file({"logits": model(tokens).logits.detach(), "greedy": given}, sys.argv[3])
"""


@pytest.mark.slow
def test_an_exported_model_needs_neither_the_workbench_nor_this_package(
    builder: Builder, model: HybridLM, tmp_path: Path
) -> None:
    folder, question, answer = tmp_path / "model", tmp_path / "question", tmp_path / "answer"
    builder.exporters["huggingface"].export(
        model, builder, folder, None, {"study": "s", "trial": 0, "metrics": {}, "units": {}}
    )
    ids = tokens(2, 40)
    save_file({"tokens": ids}, question)
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
        assert relative(seen["logits"], model(ids)) < TOLERANCE
        states = model.init_state(2, 17)
        greedy = [model.prefill(ids[:, :9], states).argmax(-1)]
        while len(greedy) < 8:
            greedy.append(model.step(greedy[-1], states).argmax(-1))
    assert seen["greedy"][:, 9:].tolist() == torch.stack(greedy, 1).tolist()
