"""The own kernels of a decode step against torch, and generations that are replayed whole."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from workbench import Block, Layout
from workbench.builder import Builder
from workbench.captured_generation import CapturedGeneration, CapturedPrefill
from workbench.decoding import CapturedStep, captured_or_eager, set_state_dtype
from workbench.generation import SamplingConfig
from workbench.kernels import operations, prefer
from workbench.linear_step import few_rows, linear_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BLOCKS = (
    Block(layer="mamba2", config={"headdim": 32, "d_state": 32}),
    Block(layer="attention", config={"num_heads": 6, "num_kv_heads": 2, "head_dim": 32}),
    Block(layer="attention", config={"num_heads": 4, "sliding_window": 12}),
    Block(layer="swiglu"),
    Block(layer="mamba", config={"d_state": 16}),
)
LAYOUT = Layout(d_model=128, vocab_size=499, blocks=BLOCKS)
PROMPT, NEW = 24, 20


@pytest.fixture(autouse=True)
def no_preference():
    yield
    prefer({})


@pytest.fixture
def model():
    return Builder.load().build(LAYOUT, device="cuda", seed=0).to(torch.bfloat16).eval()


def error(found, wanted):
    found, wanted = found.detach().float(), wanted.detach().float()
    return float((found - wanted).norm() / wanted.norm())


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda").to(dtype)


def tokens(batch, length=PROMPT + NEW):
    return torch.randint(499, (batch, length), device="cuda")


@pytest.mark.parametrize("operation", ["attention_step", "linear_step", "ssd"])
def test_the_own_kernels_work_here(operation):
    Builder.load()  # plugins define operations
    assert operations()[operation].why_not("triton") == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(12, 4), (8, 1), (5, 5), (64, 1)])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("batch", [1, 40, 300])
def test_attention_is_torchs(dtype, heads, head_dim, batch):
    from workbench_attention.triton_decode import decode_attention

    slots, kv = 203, heads[1]
    for position in (0, 1, 64, 202, 203, 1000):
        q, k, v = (random(batch, count, head_dim, dtype=dtype) for count in (heads[0], kv, kv))
        caches = [random(batch, kv, slots, head_dim, dtype=dtype) for _ in "kv"]
        wanted_caches = [cache.clone() for cache in caches]
        for cache, new in zip(wanted_caches, (k, v), strict=True):
            cache[:, :, position % slots] = new
        seen = (cache[:, :, : min(position + 1, slots)].float() for cache in wanted_caches)
        wanted = F.scaled_dot_product_attention(
            q[:, :, None].float(), *seen, scale=0.2, enable_gqa=True
        )
        found = decode_attention(q, k, v, *caches, torch.tensor(position, device="cuda"), 0.2)
        assert error(found, wanted[:, :, 0]) < 1e-2
        for cache, wanted_cache in zip(caches, wanted_caches, strict=True):
            assert torch.equal(cache, wanted_cache)


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("sizes", [(768, 3352), (1536, 768), (776, 33), (8, 1), (768, 50280)])
@pytest.mark.parametrize("bias", [False, True])
def test_linears_on_few_rows_are_torchs(rows, sizes, bias):
    linear = nn.Linear(*sizes, bias=bias, device="cuda", dtype=torch.bfloat16)
    x, residual = random(rows, sizes[0]), random(rows, sizes[1])
    wanted = F.linear(x.float(), linear.weight.float(), linear.bias.float() if bias else None)
    with torch.inference_mode(), few_rows(linear, rows):
        assert error(linear(x), wanted) < 1e-2
        found = linear_step(x, linear.weight, linear.bias, residual, None, 0.0)
    assert error(found, wanted + residual.float()) < 1e-2


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("sizes", [(768, 3352), (2048, 768), (776, 33), (8, 1), (4096, 500)])
def test_a_norm_in_a_linear_is_torchs(rows, sizes):
    x, weight, scale = random(rows, sizes[0]), random(*sizes[::-1]), random(sizes[0])
    residual = random(rows, sizes[1])
    normed = F.rms_norm(x.float(), scale.shape, scale.float(), 1e-5)
    found = linear_step(x, weight, None, residual, scale, 1e-5)
    assert error(found, F.linear(normed, weight.float()) + residual.float()) < 1e-2


@torch.inference_mode()
def test_kernels_that_start_early_read_what_those_ahead_wrote():
    """A chain, each kernel of which depends on the one before it, in eager mode and replayed."""
    weights = [random(1024, 1024) / 32 for _ in range(40)]
    x, scale = random(2, 1024), torch.ones(1024, device="cuda", dtype=torch.bfloat16)

    def chain():
        y = x
        for weight in weights:
            y = linear_step(y, weight, None, None, scale, 1e-5)
        return y

    def wanted():
        y = x
        for weight in weights:
            normed = F.rms_norm(y.float(), scale.shape, scale.float(), 1e-5)
            y = F.linear(normed, weight.float()).bfloat16()
        return y

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = chain()
    for _ in range(20):
        x.copy_(random(2, 1024))
        expected = wanted()
        assert error(chain(), expected) < 3e-2
        graph.replay()
        assert error(replayed, expected) < 3e-2


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3, 9])
@torch.inference_mode()
def test_captured_steps_are_torchs(model, batch, state_dtype):
    set_state_dtype(model, state_dtype)
    row = tokens(batch)
    states = model.init_state(batch, PROMPT + NEW)
    model.prefill(row[:, :PROMPT], states)
    plain = copy.deepcopy(states)
    step = CapturedStep(model, states, batch)
    found = [step(row[:, i]).clone() for i in range(PROMPT, PROMPT + NEW)]
    prefer(dict.fromkeys(operations(), "torch"))
    wanted = [model.step(row[:, i], plain) for i in range(PROMPT, PROMPT + NEW)]
    assert max(error(f, w) for f, w in zip(found, wanted, strict=True)) < 3e-2


@pytest.mark.parametrize("batch", [1, 5])
@torch.inference_mode()
def test_captured_prefills_are_prefills_however_often(model, batch):
    states = model.init_state(batch, PROMPT + NEW)
    prefill = CapturedPrefill(model, states, tokens(batch, PROMPT))
    step = None
    for _ in range(3):
        row, fresh = tokens(batch), model.init_state(batch, PROMPT + NEW)
        assert error(prefill(row[:, :PROMPT]), model.prefill(row[:, :PROMPT], fresh)) < 3e-2
        step = step or CapturedStep(model, states, batch)
        for index in range(PROMPT, PROMPT + NEW):
            assert error(step(row[:, index]), model.step(row[:, index], fresh)) < 3e-2


@torch.inference_mode()
def test_captured_generations_follow_from_their_prompt(model):
    prompt = tokens(2, PROMPT)
    generate = CapturedGeneration(model, prompt, NEW)
    first = generate(prompt)
    assert first.shape == (2, NEW)
    assert not torch.equal(generate(prompt.flip(1)), first)
    assert torch.equal(generate(prompt), first)


@torch.inference_mode()
def test_capturing_draws_nothing_and_keeps_refused_states(model, monkeypatch):
    states = model.init_state(1, PROMPT)
    torch.cuda.manual_seed(3)
    before = torch.cuda.get_rng_state()
    CapturedStep(model, states, 1, sampling=SamplingConfig(top_k=5))
    assert torch.equal(torch.cuda.get_rng_state(), before)
    states = model.init_state(1, PROMPT)
    kept = copy.deepcopy(states)

    def refuse(self):
        raise NotImplementedError("not now")

    monkeypatch.setattr(type(states[-1]), "make_static", refuse)
    step, token_B = captured_or_eager(model, states, 1), tokens(1, 1)[:, 0]
    assert states[1].position is None
    assert torch.equal(step(token_B), model.step(token_B, kept))
