"""Every figure against a built model or an independent computation."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from workbench import config as configs
from workbench.builder import Builder
from workbench.config import NoConfig
from workbench.data import Batch
from workbench.errors import FieldError, WorkbenchError
from workbench.layout import Block, Layout, Named
from workbench.metric import Subject
from workbench.quantizer import num_bytes
from workbench.testing import MetricContract
from workbench.testing.toys import ToyText
from workbench_metrics import quality, static
from workbench_metrics.config import (
    Forward,
    Step,
    Stored,
    StoredState,
)

# name → unit, direction, stage: what records and studies rely on.
CONTRACT = {
    "parameters": ("parameters", "minimize", "static"),
    "active_parameters": ("parameters", "minimize", "static"),
    "weight_bytes": ("bytes", "minimize", "static"),
    "state_bytes": ("bytes", "minimize", "static"),
    "memory_bytes": ("bytes", "minimize", "static"),
    "forward_flops": ("FLOPs", "minimize", "static"),
    "decode_flops": ("FLOPs/token", "minimize", "static"),
    "decode_ms": ("ms", "minimize", "measured"),
    "prefill_ms": ("ms", "minimize", "measured"),
    "tokens_per_second": ("tokens/s", "maximize", "measured"),
    "ttft_ms": ("ms", "minimize", "measured"),
    "tpot_ms": ("ms", "minimize", "measured"),
    "generation_tokens_per_second": ("tokens/s", "maximize", "measured"),
    "peak_memory_bytes": ("bytes", "minimize", "measured"),
    "predicted_decode_ms": ("ms", "minimize", "static"),
    "predicted_prefill_ms": ("ms", "minimize", "static"),
    "mqar_recall": ("share", "maximize", "synthetic"),
    "bits_per_byte_unquantized": ("bits/byte", "minimize", "trained"),
    "bits_per_byte": ("bits/byte", "minimize", "quantized"),
    "perplexity": ("per token", "minimize", "quantized"),
    "accuracy": ("share", "maximize", "quantized"),
}
BYTES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def hybrid(*quantizers: str | None, **changes: Any) -> Layout:
    """Every built-in layer once, quantizers dealt out in turn."""
    layers = [
        Block(layer="mamba"),
        Block(layer="swiglu"),
        Block(layer="mamba2", config={"headdim": 32, "d_state": 16}),
        Block(layer="relu2_mlp"),
        Block(layer="bitlinear_mamba"),
        Block(layer="attention", config={"head_dim": 16, "num_kv_heads": 2}),
    ]
    dealt = itertools.cycle(quantizers or (None,))
    blocks = tuple(
        dataclasses.replace(block, quantizer=None if name is None else Named(name=name))
        for block, name in zip(layers, dealt, strict=False)
    )
    return Layout(d_model=64, vocab_size=256, blocks=blocks, **changes)


def measure(builder: Builder, name: str, subject: Subject, **config: Any) -> float:
    metric = builder.metrics[name]
    return metric(configs.from_dict(metric.Config, config)).measure(subject)


def subject_of(builder: Builder, layout: Layout, **parts: Any) -> Subject:
    return Subject(layout=builder.resolve(layout), builder=builder, **parts)


@pytest.mark.parametrize("name", CONTRACT)
def test_is_registered_as_records_expect(name: str, builder: Builder) -> None:
    metric = builder.metrics[name]
    assert (metric.unit, metric.direction, metric.stage) == CONTRACT[name]
    assert metric.label
    assert all(field.label for field in configs.fields_of(metric.Config).values())


# What trials rely on


class TestParameters(MetricContract):
    metric = static.Parameters
    configs = (NoConfig(),)


class TestActiveParameters(MetricContract):
    metric = static.ActiveParameters
    configs = (NoConfig(),)


class TestWeightBytes(MetricContract):
    metric = static.WeightBytes
    configs = (
        Stored(),
        Stored(dtype="bfloat16"),
    )


class TestStateBytes(MetricContract):
    metric = static.StateBytes
    configs = (
        StoredState(),
        StoredState(batch_size=3, context=7),
    )


class TestMemoryBytes(MetricContract):
    metric = static.MemoryBytes
    configs = (
        StoredState(),
        StoredState(batch_size=3, dtype="float16"),
    )


class TestForwardFlops(MetricContract):
    metric = static.ForwardFlops
    configs = (
        Forward(),
        Forward(length=9),
    )


class TestDecodeFlops(MetricContract):
    metric = static.DecodeFlops
    configs = (
        Step(),
        Step(context=9),
    )


class TestBitsPerByteUnquantized(MetricContract):
    metric = quality.BitsPerByteUnquantized
    configs = (NoConfig(),)


class TestBitsPerByte(MetricContract):
    metric = quality.BitsPerByte
    configs = (NoConfig(),)


class TestPerplexity(MetricContract):
    metric = quality.Perplexity
    configs = (NoConfig(),)


class TestAccuracy(MetricContract):
    metric = quality.Accuracy
    configs = (NoConfig(),)


# Static


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_parameters_are_those_of_the_built_model(builder: Builder, tie_embeddings: bool) -> None:
    layout = hybrid(tie_embeddings=tie_embeddings)
    subject = subject_of(builder, layout)
    built = builder.build(layout, device="meta").num_parameters
    assert measure(builder, "parameters", subject) == built
    assert measure(builder, "active_parameters", subject) == built


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize(
    "quantizers",
    [(None,), ("int8",), ("int4",), ("b1_58",), ("int8", None, "int4", "b1_58", "b1_58")],
    ids=str,
)
def test_weight_bytes_are_those_of_the_stored_model(
    builder: Builder, quantizers: tuple[str | None, ...], dtype: torch.dtype
) -> None:
    layout = hybrid(*quantizers)
    model = builder.build(layout, dtype=dtype)
    builder.quantize(model)
    subject = subject_of(builder, layout)
    assert measure(builder, "weight_bytes", subject, dtype=BYTES[dtype]) == num_bytes(model)


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize(("batch_size", "context"), [(1, 1), (3, 40)])
def test_memory_is_weights_and_states(
    builder: Builder, batch_size: int, context: int, dtype: torch.dtype
) -> None:
    layout = hybrid("int8")
    model = builder.build(layout, dtype=dtype)
    builder.quantize(model)
    held = sum(state.num_bytes for state in model.init_state(batch_size, context))
    config = {"batch_size": batch_size, "context": context, "dtype": BYTES[dtype]}
    subject = subject_of(builder, layout)
    assert measure(builder, "state_bytes", subject, **config) == held
    assert measure(builder, "memory_bytes", subject, **config) == num_bytes(model) + held
    assert subject.extras == {"weights": num_bytes(model), "state": held}


def test_forward_flops_are_those_that_torch_counts(builder: Builder) -> None:
    layout = Layout(d_model=64, vocab_size=256, blocks=(Block(layer="swiglu"),) * 3)
    model = builder.build(layout, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 24, dtype=torch.long, device="meta"))
    counted = counter.get_total_flops()
    figure = measure(builder, "forward_flops", subject_of(builder, layout), length=24)
    assert figure == pytest.approx(counted, rel=0.01)  # torch counts matrix products only
    assert figure >= counted


def test_decode_flops_grow_with_the_context_where_attention_is(builder: Builder) -> None:
    def growth(layer: str) -> float:
        subject = subject_of(
            builder, Layout(d_model=64, vocab_size=256, blocks=(Block(layer=layer),))
        )
        return measure(builder, "decode_flops", subject, context=1000) - measure(
            builder, "decode_flops", subject, context=500
        )

    assert growth("mamba") == growth("swiglu") == 0
    # 4 · heads · head_dim a token of context: scores and weighted sum.
    assert growth("attention") == pytest.approx(4 * 64 * 500, rel=0.05)


# Trained and quantized

QUALITY = ("bits_per_byte", "bits_per_byte_unquantized", "perplexity", "accuracy")


class Counting(ToyText):
    """Toy text that counts how often it is read, as synthetic data if asked."""

    reads = 0
    synthetic = False

    def validation_batches(self, batch_size: int, length: int) -> Iterator[Batch]:
        self.reads += 1
        for batch in super().validation_batches(batch_size, length):
            yield dataclasses.replace(batch, num_bytes=None) if self.synthetic else batch


@pytest.fixture
def judged(builder: Builder, tmp_path: Path) -> Subject:
    data = Counting(NoConfig(), cache_dir=tmp_path)
    layout = Layout(d_model=32, vocab_size=256, blocks=(Block(layer="swiglu"),) * 2)
    model = builder.build(layout)
    return subject_of(builder, layout, model=model, data=data, batch_size=16, length=50)


def test_quality_equals_an_independent_computation(builder: Builder, judged: Subject) -> None:
    """Token by token in float64, straight from the text."""
    tokens = judged.data.parts["validation"]  # type: ignore[union-attr]
    rows = (len(tokens) - 1) // 50
    bits, hits = 0.0, 0
    with torch.no_grad():
        for row in range(rows):
            window = tokens[row * 50 : row * 50 + 51]
            probabilities = judged.built(window[None, :-1])[0].double().softmax(-1)
            for position, target in enumerate(window[1:].tolist()):
                bits -= math.log2(probabilities[position, target])
                hits += int(probabilities[position].argmax()) == target
    count = rows * 50  # one byte a token
    for name in ("bits_per_byte", "bits_per_byte_unquantized"):
        judged.extras = {}
        assert measure(builder, name, judged) == pytest.approx(bits / count, rel=1e-5)
        assert judged.extras == {"perplexity": pytest.approx(2 ** (bits / count), rel=1e-5)}
    assert measure(builder, "perplexity", judged) == pytest.approx(2 ** (bits / count), rel=1e-5)
    assert measure(builder, "accuracy", judged) == hits / count


def test_one_pass_serves_all_quality_metrics(builder: Builder, judged: Subject) -> None:
    for name in QUALITY:
        measure(builder, name, judged)
    assert judged.data.reads == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("name", QUALITY)
def test_quality_needs_data(builder: Builder, judged: Subject, name: str) -> None:
    judged.data = None
    with pytest.raises(WorkbenchError, match=r"give the study a \[data\] table"):
        measure(builder, name, judged)


@pytest.mark.parametrize("name", ["bits_per_byte", "bits_per_byte_unquantized"])
def test_synthetic_tasks_have_no_bytes(builder: Builder, judged: Subject, name: str) -> None:
    judged.data.synthetic = True  # type: ignore[union-attr]
    with pytest.raises(WorkbenchError, match="not a synthetic task"):
        measure(builder, name, judged)
    assert judged.extras == {}
    assert 0 <= measure(builder, "accuracy", judged) <= 1


# Configs


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("state_bytes", {"batch_size": 0}),
        ("memory_bytes", {"context": 0}),
        ("weight_bytes", {"dtype": "int8"}),
        ("forward_flops", {"length": -1}),
        ("tokens_per_second", {"tokens": 0}),
        ("tpot_ms", {"tokens": 1}),
        ("peak_memory_bytes", {"phase": "sleep"}),
        ("predicted_decode_ms", {"threads": 0}),
        ("predicted_prefill_ms", {"length": 0}),
    ],
)
def test_nonsense_is_refused_with_its_field(
    builder: Builder, name: str, config: dict[str, Any]
) -> None:
    with pytest.raises(FieldError) as error:
        configs.from_dict(builder.metrics[name].Config, config)
    assert error.value.field == next(iter(config))
