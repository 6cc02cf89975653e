"""Bounds against weights that are counted on the built model, and ceilings against physics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workbench.linked_layers import SharedMLP
from workbench import roofline
from workbench.builder import Builder
from workbench.errors import FieldError, WorkbenchError
from workbench.latency_machine import Machine
from workbench.layout import Block, Layout, Named
from workbench.quantizer import num_bytes
from workbench.roofline import Ceilings, Roofline, Work, ceilings, measure_ceilings
from workbench.testing.toys import toy_builder


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def limits(bandwidth: float = 1e9, rate: float = 1e12, dtype: str = "float32") -> Ceilings:
    machine = Machine.here("cpu", dtype)
    return Ceilings(machine=machine, bandwidth=bandwidth, rate=rate, cache_bytes=10**5)


def hybrid(quantizer: str | None = None, **changes: Any) -> Layout:
    stored = None if quantizer is None else Named(name=quantizer)
    names = {"mamba": {}, "mamba2": {"headdim": 32}, "attention": {"head_dim": 16}, "swiglu": {}}
    blocks = tuple(Block(layer=n, config=c, quantizer=stored) for n, c in names.items())
    return Layout(**{"d_model": 64, "vocab_size": 256, "blocks": blocks, **changes})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantizer", [None, "int8", "b1_58"])
def test_a_step_reads_weights_once_and_states_once_a_sequence(
    builder: Builder, quantizer: str | None, dtype: str
) -> None:
    layout = hybrid(quantizer)
    model = builder.build(layout, dtype=getattr(torch, dtype))
    builder.quantize(model)
    line = Roofline(builder, limits(dtype=dtype))
    one, many = (line.bound(layout, "decode", batch, 40).work for batch in (1, 9))
    element = 4 if dtype == "float32" else 2
    costs = builder.costs(layout, length=40, bytes_per_element=element).total
    assert one.bytes == num_bytes(model) + costs.decode_state_bytes
    assert many.bytes - one.bytes == 8 * costs.decode_state_bytes
    assert many.flops == 9 * one.flops == 9 * costs.decode_flops


def test_an_untied_embedding_is_not_read_whole(builder: Builder) -> None:
    line = Roofline(builder, limits())
    tied, untied = (
        line.bound(hybrid(tie_embeddings=tie), "decode", 1, 8).work for tie in (True, False)
    )
    assert tied == untied


def test_a_prefill_scores_the_last_position_only(builder: Builder) -> None:
    line, layout = Roofline(builder, limits()), hybrid()
    work = line.bound(layout, "prefill", 3, 50).work
    costs = builder.costs(layout, length=50)
    head = 2 * 256 * 64
    assert work.flops == 3 * (costs.total.forward_flops - 49 * head)
    assert work.bytes == costs.weight_bytes + 3 * costs.total.state_bytes


def test_shared_weights_are_read_once() -> None:
    builder = toy_builder()
    builder.layers.add("shared", SharedMLP, builder.layers.provenance("toy-mlp"))

    def read(depth: int) -> float:
        blocks = (Block(layer="shared"),) * depth
        layout = Layout(d_model=32, vocab_size=64, blocks=blocks)
        return Roofline(builder, limits()).bound(layout, "decode", 1, 1).work.bytes

    assert read(3) - read(2) == read(2) - read(1) == 4 * (32 + 32)  # a scale and a norm


def test_experts_that_no_token_uses_are_not_read() -> None:
    builder = Builder.load([Path(__file__).parents[2] / "plugins" / "moe"])
    block = Block(layer="moe", config={"num_experts": 64, "intermediate_size": 32})
    layout = Layout(d_model=64, vocab_size=64, blocks=(block,))
    work = Roofline(builder, limits()).bound(layout, "decode", 1, 1).work
    assert work.bytes < builder.costs(layout, length=1).weight_bytes / 4


def test_the_slower_of_both_ceilings_binds(builder: Builder) -> None:
    layout = hybrid()
    for bandwidth, rate in ((1e9, 1e15), (1e15, 1e9)):
        bound = Roofline(builder, limits(bandwidth, rate)).bound(layout, "decode", 4, 64)
        memory, compute = bound.work.bytes / bandwidth, bound.work.flops / rate
        assert (bound.memory_seconds, bound.compute_seconds) == pytest.approx((memory, compute))
        assert bound.seconds == max(memory, compute)
        assert bound.gap(2 * bound.seconds) == pytest.approx(2)
        assert bound.mfu(2 * compute) == pytest.approx(0.5)
        assert bound.mbu(memory / 2) == pytest.approx(2)
        assert not bound.fits_cache


def test_what_fits_the_cache_says_so(builder: Builder) -> None:
    line = Roofline(builder, limits())
    assert line.bound_of(Work(bytes=10**5, flops=1.0)).fits_cache
    assert not line.bound_of(Work(bytes=10**5 + 1, flops=1.0)).fits_cache


@pytest.mark.parametrize("bad", [("both", 1, 1), ("decode", 0, 1), ("prefill", 1, 0)])
def test_nonsense_is_refused(builder: Builder, bad: Any) -> None:
    with pytest.raises(FieldError):
        Roofline(builder, limits()).bound(hybrid(), *bad)


# Ceilings


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that are measured at once."""
    monkeypatch.setattr(roofline, "COPIED", {"cpu": 2**22})
    monkeypatch.setattr(roofline, "SIDE", {"cpu": 128})
    monkeypatch.setattr(roofline, "_measured", {})


def test_a_device_s_ceilings_are_plausible(small: None) -> None:
    found = measure_ceilings("cpu")
    assert 1e8 < found.bandwidth < 1e14
    assert 1e8 < found.rate < 1e16
    assert found.machine == Machine.here("cpu")
    assert found.cache_bytes >= 0


def test_ceilings_are_measured_once_and_kept(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ceilings("cpu", "float32", tmp_path)
    other = ceilings("cpu", "bfloat16", tmp_path)
    assert other.machine.dtype == "bfloat16"
    assert len(list(tmp_path.iterdir())) == 2

    def never(*arguments: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(roofline, "measure_ceilings", never)
    assert ceilings("cpu", "float32", tmp_path) is first
    monkeypatch.setattr(roofline, "_measured", {})
    assert ceilings("cpu", "float32", tmp_path) == first
    torch.set_num_threads(2)  # another machine, as far as figures go
    with pytest.raises(AssertionError, match="measured again"):
        ceilings("cpu", "float32", tmp_path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"schema": 7}, "schema 7"),
        ({"bandwidth": "fast"}, "no measured ceilings"),
        ({"machine": {}}, "no measured ceilings"),
    ],
)
def test_damaged_ceilings_are_refused(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, words: str
) -> None:
    ceilings("cpu", "float32", tmp_path)
    monkeypatch.setattr(roofline, "_measured", {})
    (path,) = tmp_path.iterdir()
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(WorkbenchError, match=words) as error:
        ceilings("cpu", "float32", tmp_path)
    assert str(path) in str(error.value)
    assert "Delete it" in str(error.value)


def test_a_device_without_a_clock_is_refused() -> None:
    with pytest.raises(WorkbenchError, match="cannot time on 'meta'"):
        measure_ceilings("meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_s_ceilings_are_plausible() -> None:
    found = measure_ceilings("cuda", "bfloat16")
    assert 1e11 < found.bandwidth < 1e14
    assert 1e12 < found.rate < 1e16
    assert found.cache_bytes > 2**20
