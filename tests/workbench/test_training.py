"""Training: resumable to the same losses, deterministic, honest about divergence."""

from __future__ import annotations

import dataclasses
import errno
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import nn

from tests.workbench.conftest import TOYS
from workbench import Block, FieldError, Layout, WorkbenchError, training
from workbench.builder import default_builder
from workbench.evaluation import evaluate
from workbench.training import (
    CheckpointError,
    DivergedError,
    TrainingConfig,
    load_weights,
    make_optimizers,
    save_weights,
    train,
)

CONFIG = TrainingConfig(tokens=1280, batch_size=4, seq_len=16, lr=0.02, checkpoint_seconds=0)


@pytest.fixture
def builder():
    return default_builder((str(TOYS),))


@pytest.fixture
def data(builder, tmp_path):
    source = builder.data_sources["counting"]
    return source(source.Config(), seed=3, cache_dir=tmp_path)


def make_model(builder, *layers, tied=True):
    blocks = tuple(Block(layer=name) for name in layers or ("toy", "other"))
    layout = Layout(d_model=8, vocab_size=16, blocks=blocks, tie_embeddings=tied)
    return builder.build(layout, seed=1)


def test_training_learns_and_repeats_exactly(builder, data):
    before = evaluate(make_model(builder), data, 4, 16)
    runs = []
    for _ in range(2):
        model = make_model(builder)
        runs.append((train(model, data, CONFIG), evaluate(model, data, 4, 16)))
    (first, after), (second, _) = runs
    assert after.loss < before.loss - 0.2
    assert [p["loss"] for p in first.curve] == [p["loss"] for p in second.curve]
    assert first.steps == 20
    assert first.curve[-1]["tokens"] == 1280


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_resumed_run_has_the_losses_of_an_unbroken_one(builder, data, tmp_path, optimizer):
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    whole = train(make_model(builder), data, config)
    checkpoint = tmp_path / "checkpoint.safetensors"
    eager = dataclasses.replace(config, checkpoint_seconds=1e-9)

    def stop(point):
        if point["step"] == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make_model(builder), data, eager, checkpoint=checkpoint, progress=stop)
    resumed = train(make_model(builder), data, eager, checkpoint=checkpoint)
    assert [p["loss"] for p in resumed.curve] == [p["loss"] for p in whole.curve]
    assert [p["step"] for p in resumed.curve] == list(range(1, 21))


def test_a_strange_or_damaged_checkpoint_is_refused(builder, data, tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    eager = dataclasses.replace(CONFIG, checkpoint_seconds=1e-9)
    train(make_model(builder), data, eager, checkpoint=checkpoint)
    with pytest.raises(WorkbenchError, match="another run"):
        train(make_model(builder, "toy"), data, eager, checkpoint=checkpoint)
    whole = checkpoint.read_bytes()
    other = {"nothing": torch.zeros(1)}
    for damage in (whole[:50], whole[:-1], b"", b"no checkpoint", save(other), whole + b"more"):
        checkpoint.write_bytes(damage)
        with pytest.raises(CheckpointError, match=r"is damaged .*: delete it"):
            train(make_model(builder), data, eager, checkpoint=checkpoint)


def test_a_checkpoint_that_lacks_a_part_is_damaged(builder, data, tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    train(make_model(builder), data, CONFIG, checkpoint=checkpoint, stop=2)
    with safe_open(checkpoint, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weight = next(name for name in tensors if name.startswith("model."))
    short = json.dumps({"step": 2})
    for damaged, said in (
        ({k: v for k, v in tensors.items() if k != weight}, metadata),
        ({k: v for k, v in tensors.items() if k != "rng"}, metadata),
        (tensors | {weight: tensors[weight][:1]}, metadata),
        (tensors, metadata | {"progress": short}),
    ):
        save_file(damaged, checkpoint, said)
        with pytest.raises(CheckpointError, match="lacks a part"):
            train(make_model(builder), data, CONFIG, checkpoint=checkpoint)
    save_file(tensors, checkpoint, metadata)
    assert train(make_model(builder), data, CONFIG, checkpoint=checkpoint).curve


def test_a_checkpoint_that_cannot_be_opened_now_is_not_called_damaged(
    builder, data, tmp_path, monkeypatch
):
    checkpoint = tmp_path / "checkpoint.safetensors"
    train(make_model(builder), data, CONFIG, checkpoint=checkpoint, stop=2)

    def too_many_files(*_, **__):
        raise FileNotFoundError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(training, "safe_open", too_many_files)
    with pytest.raises(WorkbenchError, match=r"cannot be read: .*Too many open files") as error:
        train(make_model(builder), data, CONFIG, checkpoint=checkpoint)
    assert not isinstance(error.value, CheckpointError)


def test_divergence_says_where(builder, data):
    with pytest.raises(DivergedError, match="step 1"):
        train(make_model(builder, "diverges"), data, CONFIG)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_one_optimizer(builder, optimizer, tied):
    model = make_model(builder, tied=tied)
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    held = [
        parameter
        for made in make_optimizers(model, config)
        for group in made.param_groups
        for parameter in group["params"]
    ]
    assert len(held) == len({id(p) for p in held})
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}


def test_muon_takes_hidden_matrices_only(builder):
    model = make_model(builder)
    adamw, muon = make_optimizers(model, CONFIG)
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head]
    assert taken == {id(linear.weight) for linear in linears}
    free = [g["params"] for g in adamw.param_groups if g["weight_decay"] == 0]
    assert {id(p) for group in free for p in group} == {
        id(p) for name, p in model.named_parameters() if "norm" in name
    }


def test_schedule_rises_stays_and_falls():
    config = TrainingConfig(tokens=100 * 64, batch_size=4, seq_len=16, warmup=0.1, cooldown=0.5)
    rates = [config.lr_at(step) / config.lr for step in range(config.steps)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[30] == rates[49] == 1.0
    assert rates[75] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tokens": 10}, "tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"lr": 0.0}, "lr"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"warmup": 0.7, "cooldown": 0.7}, "cooldown"),
        ({"warmup": 2.0}, "warmup"),
    ],
)
def test_impossible_settings_name_their_field(change, field):
    with pytest.raises(FieldError) as caught:
        dataclasses.replace(CONFIG, **change)
    assert caught.value.field == field


@pytest.mark.parametrize("tied", [True, False])
def test_weights_come_back_exactly(builder, tmp_path, tied):
    model = make_model(builder, tied=tied)
    save_weights(model, tmp_path / "model.safetensors")
    other = builder.build(model.layout, seed=2)
    load_weights(other, tmp_path / "model.safetensors")
    tokens = torch.arange(12).reshape(2, 6)
    assert torch.equal(model(tokens), other(tokens))
    with pytest.raises(WorkbenchError, match="does not fit"):
        load_weights(make_model(builder, "toy", tied=tied), tmp_path / "model.safetensors")
    with pytest.raises(WorkbenchError, match="cannot read"):
        load_weights(other, tmp_path / "missing.safetensors")
