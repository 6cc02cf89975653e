"""Blocks that build on earlier ones: shared weights, published tensors, auxiliary losses."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.workbench.linked_layers import BareMLP, Loser, Publisher, Reader, SharedMLP
from workbench.builder import Builder
from workbench.config import NoConfig
from workbench.data import Batch
from workbench.errors import FieldError
from workbench.layout import Block, Layout, Named
from workbench.testing import LayerContract
from workbench.testing.toys import ToyText, toy_builder
from workbench.training import TrainingConfig, load_weights, save_weights, train


class TestSharedMLP(LayerContract):
    layer = SharedMLP
    configs = (NoConfig(),)

    def earlier(self, config):
        return [(self.name, SharedMLP, config)]


class TestReader(LayerContract):
    layer = Reader
    configs = (NoConfig(),)

    def earlier(self, config):
        return [("publisher", Publisher, NoConfig())]


@pytest.fixture
def linked() -> Builder:
    builder = toy_builder()
    layers = {
        "shared": SharedMLP, "publisher": Publisher, "reader": Reader, "loser": Loser,
        "bare": BareMLP,
    }  # fmt: skip
    for name, layer in layers.items():
        builder.layers.add(name, layer, builder.layers.provenance("toy-mlp"))
    return builder


def layout_of(*names: str, quantizer: str | None = None) -> Layout:
    stored = None if quantizer is None else Named(name=quantizer)
    blocks = tuple(Block(layer=name, quantizer=stored) for name in names)
    return Layout(d_model=32, vocab_size=256, blocks=blocks)


def test_shared_weights_count_once(linked: Builder) -> None:
    layout = layout_of("shared", "toy-mlp", "shared", "shared")
    model = linked.build(layout)
    assert model.sources == [None, None, 0, 0]
    costs = linked.costs(layout, length=8)
    assert costs.total.parameters == costs.total.active_parameters == model.num_parameters
    assert costs.weight_bytes == 4 * model.num_parameters
    assert costs.blocks[0].costs.parameters - costs.blocks[2].costs.parameters == 4 * 32**2
    assert model.layers[2].up_proj is model.layers[0].up_proj
    assert "blocks.2.layer.up_proj.weight" not in model.state_dict()
    assert costs.blocks[2].costs.decode_flops == costs.blocks[0].costs.decode_flops


@pytest.mark.parametrize("quantizer", ["int8", "int4"])
def test_shared_weights_are_quantized_once(quantizer: str) -> None:
    builder = Builder.load()
    builder.layers.add("shared", SharedMLP, builder.layers.provenance("mamba"))
    layout = layout_of("shared", "shared", quantizer=quantizer)
    model = builder.build(layout)
    expected = copy.deepcopy(model)
    for block in range(2):  # each as if it had weights of its own
        expected.layers[block].up_proj = copy.deepcopy(expected.layers[0].up_proj)
        expected.layers[block].down_proj = copy.deepcopy(expected.layers[0].down_proj)
    builder.quantize(model)
    for layer in expected.layers:
        stored = builder.quantizers[quantizer]
        stored.quantize(layer, stored.Config())
    tokens_BT = torch.arange(12).view(2, 6)
    assert torch.equal(model(tokens_BT), expected(tokens_BT))
    held = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    held -= model.lm_head.weight.numel() * 4
    assert builder.costs(layout, length=8).weight_bytes == held


def test_copies_and_files_keep_weights_shared(linked: Builder, tmp_path: Path) -> None:
    layout = layout_of("shared", "shared", "toy-mlp")
    model, other = linked.build(layout), linked.build(layout, seed=1)
    save_weights(model, tmp_path / "weights.safetensors")
    load_weights(other, tmp_path / "weights.safetensors")
    tokens_BT = torch.arange(12).view(2, 6)
    for same in (other, copy.deepcopy(model), linked.build(layout, device="meta")):
        assert same.layers[1].up_proj is same.layers[0].up_proj
    assert torch.equal(other(tokens_BT), model(tokens_BT))
    emptied = linked.build(layout, device="meta").to_empty(device="cpu")
    emptied.tie_weights()
    load_weights(emptied, tmp_path / "weights.safetensors")
    assert torch.equal(emptied(tokens_BT), model(tokens_BT))


def test_both_depths_train_the_shared_weights(linked: Builder) -> None:
    model = linked.build(layout_of("shared", "shared"))
    tokens_BT = torch.arange(12).view(2, 6)
    weight = model.layers[0].up_proj.weight
    (together,) = torch.autograd.grad(model(tokens_BT).square().sum(), weight)
    apart = copy.deepcopy(model)
    apart.layers[1].up_proj = copy.deepcopy(apart.layers[0].up_proj)
    weights = [layer.up_proj.weight for layer in apart.layers]
    each = torch.autograd.grad(apart(tokens_BT).square().sum(), weights)
    assert all(gradient.abs().max() > 0 for gradient in each)
    torch.testing.assert_close(together, sum(each))


def test_a_reader_sees_the_nearest_publisher_and_the_embedding(linked: Builder) -> None:
    model = linked.build(layout_of("publisher", "reader", "publisher", "toy-mlp", "reader"))
    assert model.sources == [None, 0, None, None, 2]
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    for index in (1, 4):

        def spy(module, arguments, index=index):
            context = arguments[1]
            seen[index] = (context.source["values_BTD"], context.embedding_BTD)

        model.layers[index].register_forward_pre_hook(spy)
    outputs = {}
    for index in (0, 2):

        def keep(module, arguments, output, index=index):
            outputs[index] = output

        model.layers[index].register_forward_hook(keep)
    tokens_BT = torch.arange(12).view(2, 6)
    model(tokens_BT)
    for reader, publisher in ((1, 0), (4, 2)):
        assert seen[reader][0] is outputs[publisher]
        assert torch.equal(seen[reader][1], model.embedding(tokens_BT))


def test_nobody_keeps_what_nobody_reads(linked: Builder) -> None:
    model = linked.build(layout_of("publisher", "toy-mlp"))
    contexts = []
    model.layers[0].register_forward_pre_hook(lambda _, arguments: contexts.append(arguments[1]))
    model(torch.arange(4)[None])
    assert contexts[0].published is None


def test_a_missing_source_is_named(linked: Builder) -> None:
    with pytest.raises(FieldError, match=r"blocks\[1\] \(reader\).*place a publisher before it"):
        linked.resolve(layout_of("toy-mlp", "reader"))


def test_a_shared_block_must_be_like_its_source(
    linked: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SharedMLP, "source", classmethod(lambda cls, d_model, blocks: 0))
    with pytest.raises(FieldError, match="must build on an earlier block, not on block 0"):
        linked.resolve(layout_of("shared"))
    with pytest.raises(FieldError, match="shares weights with block 0: give both one config"):
        linked.resolve(layout_of("toy-mlp", "shared"))


def test_the_bare_stream(linked: Builder) -> None:
    layout = layout_of("bare", "toy-mlp")
    model = linked.build(layout)
    received = []
    model.layers[0].register_forward_pre_hook(lambda _, arguments: received.append(arguments[0]))
    tokens_BT = torch.arange(4)[None]
    model(tokens_BT)
    assert torch.equal(received[0], model.embedding(tokens_BT))
    assert linked.costs(layout, length=8).total.parameters == model.num_parameters


def test_auxiliary_losses_are_minimised_and_not_reported(linked: Builder, tmp_path: Path) -> None:
    config = TrainingConfig(tokens=32, batch_size=2, seq_len=16, lr=1e-3)
    layout = layout_of("loser")
    model = linked.build(layout)
    gradients: dict[str, Tensor] = {}
    weight = model.layers[0].down_proj.weight
    weight.register_hook(lambda gradient: gradients.update(seen=gradient.clone()))
    data = ToyText(NoConfig(), cache_dir=tmp_path)
    batch: Batch = data.train_batch(0, 2, 16)
    fresh = linked.build(layout)
    added: list[Tensor] = []
    context = dataclasses.replace(batch.context, losses=added)
    loss = fresh.loss(batch.inputs_BT, batch.targets_BT, context)
    assert len(added) == 1
    (expected,) = torch.autograd.grad(loss + added[0], fresh.layers[0].down_proj.weight)
    result = train(model, data, config)
    torch.testing.assert_close(gradients["seen"], expected)
    assert result.curve[0]["loss"] == loss.item()
    assert fresh.loss(batch.inputs_BT, batch.targets_BT).item() == loss.item()
