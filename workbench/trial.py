"""One trial, judged in stages from cheap to dear (`workbench.metric.STAGES`).

The static stage runs wherever the study runs; the others run in a worker, through `judge`.
Nothing that a trial does ends the study: whatever it raises becomes its outcome.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import torch

from workbench import config as configs
from workbench import kernels, sanity, stray_output
from workbench.builder import Builder
from workbench.compilation import prepared_seconds
from workbench.data import DataSource
from workbench.environment import environment
from workbench.errors import FieldError, WorkbenchError
from workbench.files import make_folder, replacing
from workbench.guard import Guard, guarded
from workbench.kernel_caches import use_kernel_caches
from workbench.layout import Layout
from workbench.metric import Metric, Stage, Subject
from workbench.model import HybridLM, backends_of
from workbench.quantizer import QuantizationReport
from workbench.rungs import measure_rung, rung_metrics
from workbench.stages import has_stage, measure_stage
from workbench.study_config import StudyConfig
from workbench.training import (
    CheckpointError,
    DivergedError,
    Progress,
    TrainingConfig,
    TrainingResult,
    load_weights,
    save_weights,
    train,
)
from workbench.trial_guard import TrialGuard
from workbench.verdict import PAUSED, InfeasibleError, Recorded, Timed, Verdict

Emit = Callable[[dict[str, Any]], None]
RUNG_STAGES = ("training", "rungs")  # what the seconds of a rung are made of
PHASES = ("building", "measuring", "practising", "training", "evaluating", "quantizing")


class Workplace:
    """What all trials of a study share in one process: metrics, data, device, kernels, a guard.

    The study's `[runtime.backends]` become the process's (`kernels.prefer`), and what it compiles
    is kept in the cache (`kernel_caches`).

    Raises:
        UnknownNameError, FieldError: a name or field of the study that does not exist.
        WorkbenchError: kernels that the study demands do not work here.
    """

    def __init__(self, config: StudyConfig, builder: Builder, device: str, cache_dir: Path) -> None:
        kernels.prefer(config.runtime.backends)
        use_kernel_caches(cache_dir, device)
        kernels.require(device)
        self.config = config
        self.builder = builder
        self.device = device
        self.training = make_training(config)
        with guarded("a metric or the data source of this study", builder.plugins.packages):
            self.metrics = make_metrics(config, builder)
            self.data = make_data(config, builder, cache_dir)
        self.threads = config.runtime.threads_on(device)
        self.guard = Guard(builder.plugins.packages)
        self._constructed: set[tuple[str, str]] = set()  # seen to allocate nothing on meta

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

    def check_construction(self, layout: Layout) -> None:
        """Refuse a layout with a layer that allocates on the meta device; looks once at each.

        Raises:
            FaultyLayerError: names the block and its tensor.
        """
        seen = {(block.layer, repr(block.config)) for block in layout.blocks}
        if not seen <= self._constructed:
            sanity.check_construction(self.builder.build(layout, device="meta"))
            self._constructed |= seen

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
            training=self.training,
            seed=self.config.seed,
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


def judge_static(place: Workplace, layout: Layout, folder: Path) -> Verdict:
    """The static stage: figures that the layout alone yields, and its constraints."""
    verdict = Verdict()
    guard = TrialGuard(verdict, place.builder, layout, place.guard)
    with stray_output.apart(), guard, Recorded(verdict, folder), Timed(verdict, "static"):
        static_figures(place, layout, verdict)
    return verdict


def static_figures(place: Workplace, layout: Layout, verdict: Verdict) -> None:
    """The static stage without its guards: for many layouts in a row.

    Raises:
        FaultyLayerError, InfeasibleError: the layout goes no further.
    """
    place.check_construction(layout)
    _measure(place, "static", place.subject(layout), verdict)


def judge(
    place: Workplace,
    layout: Layout,
    folder: Path,
    emit: Emit,
    *,
    begun: Verdict | None = None,
    stop: int | None = None,
) -> Verdict:
    """All stages that need a model; leaves the curve and the weights in `folder`.

    With a `stop` the training pauses there: the verdict is `PAUSED`, with the figures of a rung,
    and a checkpoint is left from which a later call, `begun` by this verdict, goes on.

    Args:
        layout: resolved.
        folder: the trial's; a `checkpoint.safetensors` in it is continued from, and left there
            until the trial's end is recorded.
        emit: called with progress, as JSON data: `phase` (one of `PHASES`), or `progress` (share of
            the training steps done) with `loss` (nats a token).
        begun: what the call that paused found; what is measured in it is not measured again.
        stop: the training step to pause after.
    """
    verdict = dataclasses.replace(begun or Verdict(), outcome="complete", reason="")
    verdict.details["environment"] = environment(place.device)
    guard = TrialGuard(verdict, place.builder, layout, place.guard)
    with guard, Recorded(verdict, folder, built=True):
        before = sum(verdict.stage_seconds.get(stage, 0.0) for stage in RUNG_STAGES)
        _seed(place.config.seed)
        if begun is None:
            _judge_measured(place, layout, verdict, emit)
            _judge_synthetic(place, layout, verdict, emit)
        model = _train(place, layout, folder, verdict, emit, stop)
        trained = place.subject(layout, model)
        emit({"phase": "evaluating"})
        if stop is not None:
            _judge_rung(place, trained, verdict, stop, before)
            return verdict
        with Timed(verdict, "trained"):
            # Once more: a layer may begin by ignoring what it will learn to look at.
            sanity.check_causality(model, place.training.seq_len)
            _measure(place, "trained", trained, verdict)
        with Timed(verdict, "quantized"):
            changed = _quantize(place.builder, model, verdict, emit)
            if changed:
                emit({"phase": "evaluating"})
            # Nothing quantized: the same weights, so the same pass over the validation part.
            stored = place.subject(layout, model) if changed else trained
            _measure(place, "quantized", stored, verdict)
    return verdict


@contextlib.contextmanager
def _timed(verdict: Verdict, stage: str) -> Iterator[None]:
    """`Timed`; also how much of it went to compiling, tuning and capturing (`compilation`)."""
    before = prepared_seconds()
    try:
        with Timed(verdict, stage):
            yield
    finally:
        spent = verdict.details.setdefault("preparing_seconds", {})
        spent[stage] = spent.get(stage, 0.0) + prepared_seconds() - before


def _seed(seed: int) -> None:
    """A trial draws what it would have drawn as the first of its process."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _judge_measured(place: Workplace, layout: Layout, verdict: Verdict, emit: Emit) -> None:
    """Speed is measured on the model as it will be stored: quantized, weights still random."""
    if not has_stage(place.metrics, "measured"):
        return
    emit({"phase": "building"})
    with _timed(verdict, "measured"):
        model = place.builder.build(layout, device=place.device, seed=place.config.seed).eval()
        sanity.check_outputs(model, place.training.seq_len)
        verdict.details["measured_backend"] = backends_of(model)
        _quantize_blocks(place.builder, model)
        emit({"phase": "measuring"})
        _measure(place, "measured", place.subject(layout, model), verdict)
        del model
        gc.collect()


def _judge_synthetic(place: Workplace, layout: Layout, verdict: Verdict, emit: Emit) -> None:
    """What small trainings on other tasks tell; the metrics build the models of these."""
    if not has_stage(place.metrics, "synthetic"):
        return
    with _timed(verdict, "synthetic"):
        if "measured" not in verdict.stage_seconds:  # nothing has looked at its layers
            emit({"phase": "building"})
            model = place.builder.build(layout, device=place.device, seed=place.config.seed)
            sanity.check_outputs(model, place.training.seq_len)
            del model
        emit({"phase": "practising"})
        _measure(place, "synthetic", place.subject(layout), verdict)
        gc.collect()


def _judge_rung(
    place: Workplace, subject: Subject, verdict: Verdict, step: int, before: float
) -> None:
    """Add the figures of a rung to the verdict, and pause it.

    Args:
        before: seconds that training and earlier rungs had taken.
    """
    names = rung_metrics(place.metrics, place.config.objectives)
    with Timed(verdict, "rungs"):
        figures = measure_rung(place.metrics, names, subject, step)
    tokens = step * place.training.batch_size * place.training.seq_len
    seconds = sum(verdict.stage_seconds[stage] for stage in RUNG_STAGES) - before
    rung = {"step": step, "tokens": tokens, "metrics": figures, "seconds": seconds}
    verdict.rungs = [*verdict.rungs, rung]
    verdict.outcome = PAUSED


def _train(
    place: Workplace,
    layout: Layout,
    folder: Path,
    verdict: Verdict,
    emit: Emit,
    stop: int | None,
) -> HybridLM:
    emit({"phase": "building"})
    model = place.builder.build(layout, device=place.device, seed=place.config.seed)
    seen = {"measured", "synthetic"} & verdict.stage_seconds.keys()
    if not seen and not verdict.rungs:  # nothing has looked at its layers
        sanity.check_outputs(model, place.training.seq_len)
    half = place.training.precision == "bfloat16"
    verdict.details["backend"] = backends_of(model, half=half)
    checkpoint = folder / "checkpoint.safetensors"
    curve = folder / "curve.jsonl"
    emit({"phase": "training"})
    with _timed(verdict, "training"):
        with curve.open("a" if verdict.rungs else "w", encoding="utf-8") as lines:

            def record(point: dict[str, float]) -> None:
                lines.write(json.dumps(point) + "\n")
                lines.flush()
                emit({"progress": point["step"] / place.training.steps, "loss": point["loss"]})

            try:
                result = _trained(place, model, checkpoint, verdict, record, stop)
            except DivergedError as error:
                found = sanity.culprit(place.builder, model, place.training.seq_len)
                raise DivergedError(f"{error}{found}") from None
        # A run continued from a checkpoint has points that this process never saw.
        with replacing(curve) as temporary:
            temporary.write_text("".join(json.dumps(point) + "\n" for point in result.curve))
        verdict.details["training"] = {"mode": result.mode, "note": result.note}
        verdict.details["training_seconds"] = result.seconds
        if stop is None:
            save_weights(model, folder / "model.safetensors", {"layout": layout.hash})
    return model


def _trained(
    place: Workplace,
    model: HybridLM,
    checkpoint: Path,
    verdict: Verdict,
    record: Progress,
    stop: int | None,
) -> TrainingResult:
    """`train`; a damaged checkpoint costs its time, and gives the same figures again."""
    torch.manual_seed(place.config.seed)
    try:
        return train(
            model, place.data, place.training, checkpoint=checkpoint, progress=record, stop=stop
        )
    except CheckpointError as error:
        verdict.details["restarted"] = str(error)
        checkpoint.unlink(missing_ok=True)
        return _trained(place, model, checkpoint, verdict, record, stop)


def _quantize(builder: Builder, model: HybridLM, verdict: Verdict, emit: Emit) -> bool:
    """Store the weights as the layout says; False if it says to leave them all as they are."""
    if any(block.quantizer is not None for block in model.layout.blocks):
        emit({"phase": "quantizing"})
    reports = _quantize_blocks(builder, model)
    verdict.details["quantization"] = [
        None if report is None else dataclasses.asdict(report) for report in reports
    ]
    return any(report is not None for report in reports)


def _quantize_blocks(builder: Builder, model: HybridLM) -> list[QuantizationReport | None]:
    """`Builder.quantize`, where a quantizer that refuses a block refuses the layout."""
    try:
        return builder.quantize(model)
    except FieldError as error:
        raise InfeasibleError(str(error)) from error


def _measure(place: Workplace, stage: Stage, subject: Subject, verdict: Verdict) -> None:
    measure_stage(place.metrics, place.config.constraints, stage, subject, verdict)


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
