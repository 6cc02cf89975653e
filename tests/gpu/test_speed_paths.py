"""The fast paths on a CUDA device give what the plain ones give: compiled, captured, fused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from workbench import Block, Layout
from workbench.builder import Builder
from workbench.data import Batch
from workbench.decoding import CapturedStep
from workbench.errors import WorkbenchError
from workbench.generation import SamplingConfig, stream
from workbench.kernels import prefer
from workbench.linear_cross_entropy import linear_cross_entropy
from workbench.optimizers import make_optimizers
from workbench.train_step import WARMUP, StepOptions, TrainStep
from workbench.training_config import TrainingConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BLOCKS = (
    Block(layer="mamba2", config={"headdim": 32, "d_state": 32}),
    Block(layer="swiglu"),
    Block(layer="attention", config={"num_heads": 4, "num_kv_heads": 2}),
    Block(layer="mamba", config={"d_state": 16}),
    Block(layer="bitlinear_mamba", config={"d_state": 16}),
)
LAYOUT = Layout(d_model=128, vocab_size=499, blocks=BLOCKS)
PLAIN_LAYOUT = LAYOUT.replace(blocks=BLOCKS[:4])  # without roundings that a last bit can flip


@pytest.fixture(scope="module")
def builder():
    return Builder.load()


@pytest.fixture(autouse=True)
def no_preference():
    yield
    prefer({})


def error(found, wanted):
    found, wanted = found.detach().float(), wanted.detach().float()
    return float((found - wanted).norm() / wanted.norm())


def losses(builder, layout, steps, optimizer="adamw", half=True, **options):
    torch.manual_seed(0)
    model = builder.build(layout, device="cuda", seed=0).train()
    config = TrainingConfig(tokens=10**6, optimizer=optimizer, lr=1e-3)
    step = TrainStep(
        model,
        make_optimizers(model, config),
        StepOptions(half=half, grad_clip=1.0, **{"compiled": False, "captured": False, **options}),
    )
    generator = torch.Generator().manual_seed(0)
    found = []
    with step.running():
        for index in range(steps):
            tokens = torch.randint(499, (4, 66), generator=generator)
            batch = Batch(inputs_BT=tokens[:, :-1], targets_BT=tokens[:, 1:])
            found.append(float(step(batch, 1e-3 * (1 + index % 3))))
    return found, step


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_captured_training_is_eager_training(builder, optimizer):
    wanted, _ = losses(builder, PLAIN_LAYOUT, WARMUP + 5, optimizer)
    found, step = losses(builder, PLAIN_LAYOUT, WARMUP + 5, optimizer, captured=True)
    assert step.mode == "cuda graph"
    assert not step.note
    assert found == pytest.approx(wanted, rel=2e-3)


@pytest.mark.parametrize("half", [False, True])
def test_compiled_training_is_eager_training(builder, half):
    wanted, _ = losses(builder, LAYOUT, WARMUP, half=half)
    found, step = losses(builder, LAYOUT, WARMUP, half=half, compiled=True, captured=True)
    assert step.mode == "compiled"  # too few steps for a capture
    assert found == pytest.approx(wanted, rel=2e-2 if half else 1e-3)


def test_recomputing_blocks_changes_no_loss(builder):
    wanted, _ = losses(builder, PLAIN_LAYOUT, 3)
    found, _ = losses(builder, PLAIN_LAYOUT, 3, checkpointed=True)
    assert found == pytest.approx(wanted, rel=2e-3)


@pytest.mark.parametrize(
    "backends",
    [
        {"ssd": "torch", "selective_scan": "torch", "causal_conv1d": "torch", "attention": "torch"},
        {"ssd": "mamba-ssm", "selective_scan": "mamba-ssm", "attention": "flash-attn"},
        {"ssd": "triton", "selective_scan": "triton", "attention": "cudnn"},
    ],
)
def test_backends_agree(builder, backends):
    from workbench.kernels import operations

    for operation, backend in backends.items():
        if why := operations()[operation].why_not(backend):
            pytest.skip(f"{backend}: {why}")
    wanted, _ = losses(builder, PLAIN_LAYOUT, 2, half=False)
    prefer(backends)
    found, _ = losses(builder, PLAIN_LAYOUT, 2)
    assert found == pytest.approx(wanted, rel=3e-2)


@pytest.mark.parametrize("batch_size", [1, 3])
@torch.inference_mode()
def test_captured_steps_are_steps(builder, batch_size):
    model = builder.build(PLAIN_LAYOUT, device="cuda", seed=0).eval()
    tokens = torch.randint(499, (batch_size, 40), device="cuda")
    plain = model.init_state(batch_size, 40)
    model.prefill(tokens[:, :30], plain)
    states, before = copy.deepcopy(plain), copy.deepcopy(plain)
    step = CapturedStep(model, states, batch_size)
    wanted = [model.step(tokens[:, i], plain) for i in range(30, 40)]
    for _ in range(2):
        for i in range(30, 40):
            assert error(step(tokens[:, i]), wanted[i - 30]) < 1e-3
        with pytest.raises(WorkbenchError, match="max_length"):
            step(tokens[:, 0])
        step.restore(before)


@pytest.mark.parametrize("sampling", [SamplingConfig(temperature=0.0), SamplingConfig(top_k=7)])
def test_captured_generation_draws_what_eager_draws(builder, sampling):
    model = builder.build(PLAIN_LAYOUT, device="cuda", seed=0).eval()
    prompt = torch.randint(499, (2, 9), device="cuda")
    eager, captured = (
        torch.stack(list(stream(model, prompt, 20, config=sampling, seed=3, capture=capture)))
        for capture in (False, True)
    )
    if sampling.temperature == 0:
        assert (eager == captured).float().mean() > 0.9  # near ties may fall either way
    else:
        assert captured.min() >= 0
        assert captured.max() < 499
        again = torch.stack(list(stream(model, prompt, 20, config=sampling, seed=3, capture=True)))
        assert (again == captured).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("vocabulary", [1000, 50280])
@pytest.mark.parametrize("scaling", [1.0, 7.0])
def test_chunked_cross_entropy_is_torchs(backend, vocabulary, scaling):
    prefer({"cross_entropy": backend})
    torch.manual_seed(0)
    hidden = torch.randn(300, 64, device="cuda", requires_grad=True)
    weight = torch.randn(vocabulary, 64, device="cuda", requires_grad=True)
    targets = torch.randint(vocabulary, (300,), device="cuda")
    targets[::7] = -100
    wanted = F.cross_entropy(hidden @ weight.t() / scaling, targets)
    reference = torch.autograd.grad(wanted, (hidden, weight))
    for half, tolerance in ((False, 1e-3), (True, 3e-2)):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=half):
            found = linear_cross_entropy(hidden, weight, targets, scaling=scaling, chunk=128)
        assert error(found, wanted) < tolerance
        for one, other in zip(torch.autograd.grad(found, (hidden, weight)), reference, strict=True):
            assert error(one, other) < tolerance


def test_cross_entropy_of_unlikely_and_of_broken_logits_is_torchs():
    from workbench.triton_cross_entropy import cross_entropy

    logits = 4 * torch.randn(4, 5000, device="cuda")
    logits[0, :4500] = -float("inf")
    logits[1, 7] = float("nan")
    logits[2] *= 1e4
    targets = torch.tensor([4999, 3, 5, -100], device="cuda")
    wanted = F.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
    found = cross_entropy(logits, targets, 1.0, -100, False)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)
    apart = targets.repeat_interleave(2)[::2]  # as those of sequences of one token may lie
    again = cross_entropy(logits, apart, 1.0, -100, False)
    assert torch.equal(again[[0, 2, 3]], found[[0, 2, 3]])
    around = torch.zeros(3, 5000, device="cuda")  # a target outside must not be written
    found = cross_entropy(around[1:2], torch.tensor([5000], device="cuda"), 1.0, -100, True)
    assert found.isnan().all()
    assert not around[2].any()
    assert not around[0].any()
