"""One trial, judged in stages from cheap to dear: static → measured → trained → quantized.

The static stage runs wherever the study runs; the others run in a worker, through `judge`.
Nothing that a trial does ends the study: whatever it raises becomes its outcome.
"""

from __future__ import annotations

import dataclasses
import errno
import gc
import json
import math
import os
import re
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from workbench import config as configs
from workbench.builder import Builder
from workbench.data import DataSource
from workbench.environment import environment
from workbench.errors import DiskError, FieldError, WorkbenchError
from workbench.files import make_folder, replacing
from workbench.layout import Layout
from workbench.metric import Metric, Stage, Subject
from workbench.model import HybridLM
from workbench.study_config import StudyConfig
from workbench.training import (
    DivergedError,
    TrainingConfig,
    load_weights,
    save_weights,
    train,
)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Emit = Callable[[dict[str, Any]], None]


class InfeasibleError(Exception):
    """A constraint is violated: the trial goes no further. Carries the violated bounds' text."""


class Workplace:
    """What all trials of a study share in one process: metrics, data, device.

    Raises:
        UnknownNameError, FieldError: a name or field of the study that does not exist.
    """

    def __init__(self, config: StudyConfig, builder: Builder, device: str, cache_dir: Path) -> None:
        self.config = config
        self.builder = builder
        self.device = device
        self.training = make_training(config)
        self.metrics = make_metrics(config, builder)
        self.data = make_data(config, builder, cache_dir)
        self.threads = config.runtime.threads or os.cpu_count() or 1

    def probe(self) -> None:
        """Draw a batch of each part, so that what can never be judged is refused at once.

        Raises:
            WorkbenchError: the data is too short for the batches, or a metric cannot be had on it.
        """
        shape = (self.training.batch_size, self.training.seq_len)
        try:
            self.data.train_batch(0, *shape)
            batch = next(iter(self.data.validation_batches(*shape)), None)
        except WorkbenchError as error:
            raise error.within("data") from None
        if batch is None:
            raise FieldError("training.seq_len", f"no validation batch has {shape[1]} tokens")
        for name, metric in self.metrics.items():
            try:
                metric.check(batch)
            except WorkbenchError as error:
                raise error.within(name) from None

    def subject(self, layout: Layout, model: HybridLM | None = None) -> Subject:
        """What the metrics of one stage look at."""
        return Subject(
            layout=layout,
            builder=self.builder,
            device=self.device,
            model=model,
            data=self.data,
            batch_size=self.training.batch_size,
            length=self.training.seq_len,
        )


def make_training(config: StudyConfig) -> TrainingConfig:
    """The study's `[training]` table, checked."""
    training: TrainingConfig = _within(
        "training", configs.from_dict, TrainingConfig, config.training
    )
    return training


def make_metrics(config: StudyConfig, builder: Builder) -> dict[str, Metric]:
    """An instance of every metric that the study names."""
    made = {}
    for name in config.metric_names:
        metric = builder.metrics[name]
        given = config.metrics.get(name, {})
        made[name] = metric(_within(f"metrics.{name}", configs.from_dict, metric.Config, given))
    return made


def make_data(config: StudyConfig, builder: Builder, cache_dir: Path) -> DataSource:
    """The study's data source, opened."""
    table = dict(config.data)
    source = builder.data_sources[table.pop("source")]
    data_config = _within("data", configs.from_dict, source.Config, table)
    make_folder(cache_dir)
    return source(data_config, seed=config.seed, cache_dir=cache_dir)


@dataclasses.dataclass
class Verdict:
    """How a trial ended, as its record keeps it.

    Attributes:
        outcome: a key of `records.OUTCOMES`.
        reason: why, for people.
        metrics, extras: figures by name; an extra that is not finite is None.
        constraints: violation by metric name; above 0 is violated.
        stage_seconds: wall seconds by stage.
        details: further facts (quantizer reports, environment).
    """

    outcome: str = "complete"
    reason: str = ""
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    extras: dict[str, float | None] = dataclasses.field(default_factory=dict)
    constraints: dict[str, float] = dataclasses.field(default_factory=dict)
    stage_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def update(self, other: Verdict) -> None:
        """Take over what a later stage found."""
        self.outcome, self.reason = other.outcome, other.reason
        for name in ("metrics", "extras", "constraints", "stage_seconds", "details"):
            getattr(self, name).update(getattr(other, name))


def judge_static(place: Workplace, layout: Layout, folder: Path) -> Verdict:
    """The static stage: figures that the layout alone yields, and its constraints."""
    verdict = Verdict()
    with _Recorded(verdict, folder), _Timed(verdict, "static"):
        _measure(place, "static", place.subject(layout), verdict)
    return verdict


def judge(place: Workplace, layout: Layout, folder: Path, emit: Emit) -> Verdict:
    """All stages that need a model; leaves the curve and the weights in `folder`.

    Args:
        layout: resolved.
        folder: the trial's; a `checkpoint.safetensors` in it is continued from, and left there
            until the trial's end is recorded.
        emit: called with progress, as JSON data.
    """
    verdict = Verdict()
    verdict.details["environment"] = environment(place.device)
    verdict.details["backend"] = {
        block.layer: place.builder.layers[block.layer].backend for block in layout.blocks
    }
    with _Recorded(verdict, folder):
        _judge_measured(place, layout, verdict)
        model = _train(place, layout, folder, verdict, emit)
        trained = place.subject(layout, model)
        with _Timed(verdict, "trained"):
            _measure(place, "trained", trained, verdict)
        with _Timed(verdict, "quantized"):
            changed = _quantize(place.builder, model, verdict)
            # Nothing quantized: the same weights, so the same pass over the validation part.
            stored = place.subject(layout, model) if changed else trained
            _measure(place, "quantized", stored, verdict)
    return verdict


def _judge_measured(place: Workplace, layout: Layout, verdict: Verdict) -> None:
    """Speed is measured on the model as it will be stored: quantized, weights still random."""
    if not any(metric.stage == "measured" for metric in place.metrics.values()):
        return
    with _Timed(verdict, "measured"):
        model = place.builder.build(layout, device=place.device, seed=place.config.seed).eval()
        place.builder.quantize(model)
        _measure(place, "measured", place.subject(layout, model), verdict)
        del model
        gc.collect()


def _train(
    place: Workplace, layout: Layout, folder: Path, verdict: Verdict, emit: Emit
) -> HybridLM:
    model = place.builder.build(layout, device=place.device, seed=place.config.seed)
    checkpoint = folder / "checkpoint.safetensors"
    curve = folder / "curve.jsonl"
    with _Timed(verdict, "training"):
        torch.manual_seed(place.config.seed)
        with curve.open("w", encoding="utf-8") as lines:

            def record(point: dict[str, float]) -> None:
                lines.write(json.dumps(point) + "\n")
                lines.flush()
                emit({"progress": point["step"] / place.training.steps, "loss": point["loss"]})

            result = train(
                model, place.data, place.training, checkpoint=checkpoint, progress=record
            )
        # A run continued from a checkpoint has points that this process never saw.
        with replacing(curve) as temporary:
            temporary.write_text("".join(json.dumps(point) + "\n" for point in result.curve))
        save_weights(model, folder / "model.safetensors", {"layout": layout.hash})
    return model


def _quantize(builder: Builder, model: HybridLM, verdict: Verdict) -> bool:
    """Store the weights as the layout says; False if it says to leave them all as they are."""
    reports = builder.quantize(model)
    verdict.details["quantization"] = [
        None if report is None else dataclasses.asdict(report) for report in reports
    ]
    return any(report is not None for report in reports)


def _measure(place: Workplace, stage: Stage, subject: Subject, verdict: Verdict) -> None:
    """Every metric of one stage, then the constraints on them."""
    violated = []
    for name, metric in place.metrics.items():
        if metric.stage != stage:
            continue
        subject.extras = {}
        value = float(metric.measure(subject))
        if not math.isfinite(value):
            raise DivergedError(f"{name} is {value}")
        verdict.metrics[name] = value
        for key, extra in subject.extras.items():
            finite = float(extra) if math.isfinite(float(extra)) else None
            verdict.extras[f"{name}.{key}"] = finite
        if name in place.config.constraints:
            bounds = place.config.constraints[name]
            verdict.constraints[name] = bounds.violation(value)
            if verdict.constraints[name] > 0:
                below = value < bounds.min
                limit = f"below min {bounds.min:,}" if below else f"above max {bounds.max:,}"
                violated.append(f"{name} = {value:,.8g} is {limit}")
    if violated:
        raise InfeasibleError("; ".join(violated))


class _Timed:
    """Adds the wall seconds of a block to a verdict, also when the block raises."""

    def __init__(self, verdict: Verdict, stage: str) -> None:
        self.verdict, self.stage = verdict, stage

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        seconds = time.perf_counter() - self.started
        self.verdict.stage_seconds[self.stage] = seconds


class _Recorded:
    """Turns whatever a block raises, but for an interrupt, into the verdict's outcome."""

    def __init__(self, verdict: Verdict, folder: Path) -> None:
        self.verdict, self.folder = verdict, folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        found = verdict_of(error, self.folder)
        self.verdict.outcome, self.verdict.reason = found.outcome, found.reason
        return True


def verdict_of(error: Exception, folder: Path) -> Verdict:
    """The verdict that an exception stands for; an unexpected one leaves its traceback behind.

    Args:
        folder: of the trial; the traceback is added to its `log.txt`.
    """
    outcome, reason = classify(error)
    if outcome == "error" and not isinstance(error, WorkbenchError):
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            traceback.print_exception(error, file=log)
    return Verdict(outcome=outcome, reason=reason)


def classify(error: Exception) -> tuple[str, str]:
    """The outcome that an exception stands for, and its reason in words."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    if isinstance(error, InfeasibleError | FieldError):
        return "infeasible", str(error)
    if isinstance(error, DiskError) or (isinstance(error, OSError) and error.errno in DISK_FULL):
        return "interrupted", str(error)
    if isinstance(error, DivergedError):
        return "diverged", str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _is_allocator(error):
        wanted = re.search(r"tried to allocate (\d+) bytes", str(error), re.IGNORECASE)
        return (
            "out_of_memory",
            f"an allocation of {int(wanted[1]):,} bytes failed" if wanted else text,
        )
    return "error", str(error) if isinstance(error, WorkbenchError) else text


def _is_allocator(error: Exception) -> bool:
    # torch's CPU allocator raises a plain RuntimeError, so only its words tell.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def load_trained(builder: Builder, layout: Layout, weights: Path, device: str = "cpu") -> HybridLM:
    """A trial's model with its trained weights, stored as its layout's quantizers say.

    Args:
        layout, weights: of the trial's record.
    """
    model = builder.build(layout, device=device)
    load_weights(model, weights)
    builder.quantize(model)
    return model.eval()


def _within(where: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except WorkbenchError as error:
        raise error.within(where) from None
