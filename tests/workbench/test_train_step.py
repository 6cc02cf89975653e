"""Steps run compiled, checkpointed and ahead of their batches: the same numbers as plain ones."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from torch import nn

from tests.workbench.linked_layers import Loser, Publisher, Reader, SharedMLP
from workbench import Block, Layout
from workbench.batches import AHEAD, upcoming_batches
from workbench.builder import Builder
from workbench.data import Batch
from workbench.layer import Context
from workbench.optimizers import BatchedMuon, make_optimizers, set_lr
from workbench.testing.toys import toy_builder
from workbench.train_step import WARMUP, StepOptions, TrainStep, _Captured
from workbench.training_config import TrainingConfig

VOCAB, WIDTH = 64, 32
BLOCKS = (
    Block(layer="mamba", config={"d_state": 4}),
    Block(layer="swiglu"),
    Block(layer="mamba2", config={"headdim": 16, "d_state": 8}),
    Block(layer="attention", config={"num_heads": 4, "num_kv_heads": 2}),
    Block(layer="swiglu"),
)
PLAIN = StepOptions(half=False, grad_clip=1.0, compiled=False, captured=False)
CONFIG = TrainingConfig(tokens=1280, batch_size=4, seq_len=16)


@pytest.fixture(scope="module")
def builder():
    return Builder.load()


@pytest.fixture
def linked():
    """A builder whose layers read one another, share weights and add losses."""
    made = toy_builder()
    layers = {"shared": SharedMLP, "publisher": Publisher, "reader": Reader, "loser": Loser}
    for name, layer in layers.items():
        made.layers.add(name, layer, made.layers.provenance("toy-mlp"))
    return made


def build(builder, blocks=BLOCKS):
    return builder.build(Layout(d_model=WIDTH, vocab_size=VOCAB, blocks=blocks), seed=0)


def named(*layers):
    return tuple(Block(layer=name) for name in layers)


def batch_of(step, *, rows=2, length=24, **context):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (rows, length + 1), generator=generator)
    return Batch(inputs_BT=tokens[:, :-1], targets_BT=tokens[:, 1:], context=Context(**context))


def run(model, options, steps=4):
    """The losses of a few steps."""
    model.train()
    step = TrainStep(model, make_optimizers(model, CONFIG), options)
    with step.running():
        losses = [float(step(batch_of(index), 0.01)) for index in range(steps)]
    return losses, step


@pytest.fixture
def without_inductor(monkeypatch):
    """Blocks are traced, and run as traced: no C++ compiler need be there."""
    real = torch.compile

    def light(function, *, dynamic, options):
        return real(function, dynamic=dynamic, backend="eager")

    monkeypatch.setattr(torch, "compile", light)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def graphs():
    """How many the compiler has traced."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.filterwarnings("ignore")  # torch deprecates what its own compiler uses
@pytest.mark.parametrize("blocks", [BLOCKS[3:], pytest.param(BLOCKS, marks=pytest.mark.slow)])
def test_compiled_steps_have_the_losses_of_eager_ones(builder, without_inductor, blocks):
    eager, step = run(build(builder, blocks), PLAIN)
    assert step.mode == "eager"
    model = build(builder, blocks)
    compiled, step = run(model, dataclasses.replace(PLAIN, compiled=True))
    assert step.mode == "compiled"
    assert graphs() >= len(set(blocks))  # it was not idle
    assert compiled == pytest.approx(eager, abs=1e-5)
    assert eager[-1] != eager[0]
    for block in model.blocks:
        assert "forward" not in vars(block), "the blocks stay compiled"


@pytest.mark.filterwarnings("ignore")
def test_equal_blocks_are_compiled_once(builder, without_inductor):
    options = dataclasses.replace(PLAIN, compiled=True)
    run(build(builder, named("swiglu", "swiglu")), options, steps=1)
    once = graphs()
    run(build(builder, named("swiglu") * 5), options, steps=2)  # nor anew for another model
    assert graphs() == once > 0


def kept_bytes(model, batch):
    """Loss, gradients, and the bytes that autograd keeps for the backward pass of the blocks."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    added = []
    context = dataclasses.replace(batch.context, losses=added)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.loss(batch.inputs_BT, batch.targets_BT, context)
    sum(added, loss).backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters()}
    return loss.item(), gradients, sum(kept.values())


def assert_same_but_less(model, batch):
    model.train()
    loss, gradients, kept = kept_bytes(model, batch)
    model.checkpointed = True
    less_loss, less_gradients, less_kept = kept_bytes(model, batch)
    assert less_loss == loss
    torch.testing.assert_close(less_gradients, gradients)
    return kept, less_kept


def test_checkpointed_blocks_have_the_same_gradients_and_keep_less(builder):
    batch = batch_of(0, rows=4, length=64)
    kept, less = assert_same_but_less(build(builder), batch)
    inputs = len(BLOCKS) * batch.inputs_BT.numel() * WIDTH * 4  # which a checkpoint holds itself
    assert less + inputs < kept / 3


def test_checkpointed_blocks_may_share_publish_and_add_losses(linked):
    names = ("publisher", "shared", "loser", "shared", "reader")
    kept, less = assert_same_but_less(build(linked, named(*names)), batch_of(0))
    assert less < kept


def test_checkpointed_steps_are_plain_steps(builder):
    plain, _ = run(build(builder), PLAIN)
    model = build(builder)
    forwards = []
    model.blocks[0].register_forward_pre_hook(lambda *_: forwards.append(1))
    checkpointed, _ = run(model, dataclasses.replace(PLAIN, checkpointed=True))
    assert checkpointed == plain
    assert len(forwards) == 2 * len(plain)  # once more for each backward pass
    assert not model.checkpointed


def test_a_model_is_checkpointed_in_training_alone(builder):
    model = build(builder).eval()
    model.checkpointed = True
    forwards = []
    model.blocks[0].register_forward_pre_hook(lambda *_: forwards.append(1))
    model(batch_of(0).inputs_BT).sum().backward()
    assert len(forwards) == 1


def captured(model):
    options = dataclasses.replace(PLAIN, captured=True)
    step = TrainStep(model, make_optimizers(model, CONFIG), options)
    return step, [batch_of(index) for index in range(WARMUP)]


def test_what_waits_for_the_device_is_not_captured(builder, monkeypatch):
    model = build(builder)
    step, batches = captured(model)
    monkeypatch.setattr(type(model.layers[1]), "host_synchronized", True)
    with step.running():
        for batch in [*batches, batch_of(9)]:
            step(batch, 0.01)
    assert step.mode == "eager"
    assert step.note == "SwiGLU waits for the device within a step"


def test_batches_with_masks_are_not_captured(builder):
    step, batches = captured(build(builder))
    mask = torch.ones(2, 24, dtype=torch.bool)
    with step.running():
        for batch in [*batches, batch_of(9, attention_mask_BT=mask)]:
            assert step.note == ""
            step(batch, 0.01)
    assert step.note.startswith("batches carry masks")


class Recording:
    """A stand-in for a captured step: says how often it was replayed."""

    def __init__(self):
        self.replayed = 0

    def replay(self):
        self.replayed += 1


def test_a_replay_takes_only_batches_like_the_captured_one(builder):
    model = build(builder)
    plain, other = build(builder), batch_of(1, length=8)
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[0, 0] = False
    masked = batch_of(2, attention_mask_BT=mask)
    expected = [plain.loss(b.inputs_BT, b.targets_BT, b.context) for b in (other, masked)]
    step = TrainStep(model, make_optimizers(model, CONFIG), PLAIN)
    first = batch_of(0)
    with step.running():
        places = first.inputs_BT.clone(), first.targets_BT.clone()
        recorded = step._captured = _Captured(Recording(), *places, torch.tensor(3.0))
        last = batch_of(3)
        assert step(last, 0.0) == 3
        assert step.mode == "cuda graph"
        assert recorded.graph.replayed == 1
        torch.testing.assert_close(recorded.inputs_BT, last.inputs_BT)
        torch.testing.assert_close(recorded.targets_BT, last.targets_BT)
        model.embedding.weight.grad = torch.ones_like(model.embedding.weight)  # as a replay leaves
        found = [step(batch, 0.0) for batch in (other, masked)]
        assert step.mode == "eager"
        assert recorded.graph.replayed == 1
    torch.testing.assert_close(torch.stack(found), torch.stack(expected))
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)  # a rate of 0


SHAPES = [(8, 8), (8, 8), (8, 8), (24, 8), (8, 24), (24, 8), (5, 17), (1, 9)]


def matrices(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def steps_of(optimizer, parameters, first, last):
    for index in range(first, last):
        generator = torch.Generator().manual_seed(100 + index)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        parameters[1].grad = None if index == 2 else parameters[1].grad  # without one in one step
        set_lr([optimizer], 0.02 / (1 + index))
        optimizer.step()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("rate", ["number", "tensor"])
def test_batched_muon_is_torchs(nesterov, rate):
    options = {"weight_decay": 0.1, "nesterov": nesterov, "adjust_lr_fn": "match_rms_adamw"}
    ours, theirs, start = matrices(), matrices(), matrices()
    lr = torch.tensor(0.02) if rate == "tensor" else 0.02
    batched = BatchedMuon(ours, lr=lr, **options)
    plain = torch.optim.Muon(theirs, lr=0.02, **options)
    steps_of(batched, ours, 0, 6)
    steps_of(plain, theirs, 0, 6)
    for one, other, before in zip(ours, theirs, start, strict=True):
        moved = (other - before).abs().max()
        assert (one - other).abs().max() < 0.01 * moved  # both multiply in bfloat16


def test_batched_muon_goes_on_from_torchs_state_and_back():
    options = {"lr": 0.02, "adjust_lr_fn": "match_rms_adamw"}
    theirs, ours, whole = matrices(), matrices(), matrices()
    steps_of(torch.optim.Muon(whole, **options), whole, 0, 6)
    plain = torch.optim.Muon(theirs, **options)
    steps_of(plain, theirs, 0, 2)
    batched = BatchedMuon(ours, **options)
    batched.load_state_dict(plain.state_dict())
    for mine, other in zip(ours, theirs, strict=True):
        mine.data.copy_(other.data)
    steps_of(batched, ours, 2, 4)
    plain.load_state_dict(batched.state_dict())
    for other, mine in zip(theirs, ours, strict=True):
        other.data.copy_(mine.data)
    steps_of(plain, theirs, 4, 6)
    for one, other, before in zip(theirs, whole, matrices(), strict=True):
        assert (one - other).abs().max() < 0.01 * (other - before).abs().max()


def test_a_rate_that_is_a_tensor_is_set_in_place():
    rate = torch.tensor(1.0)
    parameters = matrices()
    optimizers = [torch.optim.AdamW(parameters, lr=rate, fused=False), BatchedMuon(parameters)]
    set_lr(optimizers, 0.25)
    assert optimizers[0].param_groups[0]["lr"] is rate
    assert rate == 0.25
    assert optimizers[1].param_groups[0]["lr"] == 0.25


class Source:
    """Batches that know their step, who made them and when."""

    def __init__(self, broken_at=None):
        self.made, self.threads, self.broken_at = [], set(), broken_at

    def train_batch(self, step, batch_size, seq_len):
        if step == self.broken_at:
            raise OSError(f"step {step} cannot be read")
        self.made.append(step)
        self.threads.add(threading.current_thread().name)
        return Batch(inputs_BT=torch.full((batch_size, seq_len), step), targets_BT=torch.zeros(1))


def steps_in(batches):
    return [int(batch.inputs_BT[0, 0]) for batch in batches]


def our_threads():
    return [t for t in threading.enumerate() if t.name.startswith("workbench-batches")]


@pytest.fixture
def pinned(monkeypatch):
    """Which batches were pinned; page-locked memory needs a CUDA device."""
    seen = []
    monkeypatch.setattr(Batch, "pinned", lambda batch: seen.append(batch) or batch)
    return seen


@pytest.mark.parametrize("start", [0, 13, 18, 19, 20])
@pytest.mark.parametrize("pin", [False, True])
def test_every_batch_comes_once_and_in_order(pinned, pin, start):
    source = Source()
    assert CONFIG.steps == 20
    assert steps_in(upcoming_batches(source, CONFIG, start, pin=pin)) == list(range(start, 20))
    assert source.made == list(range(start, 20))
    assert steps_in(pinned) == (source.made if pin else [])
    assert our_threads() == []


def test_batches_are_made_when_asked_for_without_pinning(pinned):
    source = Source()
    batches = upcoming_batches(source, CONFIG, 0, pin=False)
    assert steps_in([next(batches), next(batches)]) == [0, 1]
    assert source.made == [0, 1]
    assert source.threads == {threading.current_thread().name}


def test_batches_are_made_a_little_ahead_with_pinning(pinned):
    source = Source()
    batches = upcoming_batches(source, CONFIG, 0, pin=True)
    next(batches)
    batches.close()  # waits for what is in the making, and cancels the rest
    assert threading.current_thread().name not in source.threads
    assert 1 <= len(source.made) <= 1 + AHEAD
    assert our_threads() == []


@pytest.mark.parametrize("pin", [False, True])
def test_a_source_that_fails_does_so_at_its_step(pinned, pin):
    batches = upcoming_batches(Source(broken_at=5), CONFIG, 0, pin=pin)
    assert steps_in(next(batches) for _ in range(5)) == [0, 1, 2, 3, 4]
    with pytest.raises(OSError, match="step 5 cannot be read"):
        next(batches)
    assert our_threads() == []


def test_a_batch_is_plain_if_its_context_says_nothing():
    assert batch_of(0).is_plain
    mask = torch.ones(2, 24, dtype=torch.bool)
    for context in (
        {"attention_mask_BT": mask},
        {"seq_idx_BT": mask.int()},
        {"prefix_lengths_B": torch.tensor([1, 2])},
    ):
        assert not batch_of(0, **context).is_plain
