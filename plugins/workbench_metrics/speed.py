"""Measured speed of the built model, on the device where the trial runs.

How it is timed is in `workbench.measuring`; on a CUDA device decode steps are replayed as a graph
where the model can be captured, and a note beside the figure says so, or why not. Each metric
leaves the spread beside its median, and beside both the least time that the device allows
(`workbench.roofline`), with MFU and MBU, and what a latency table of this machine predicts.
"""

from __future__ import annotations

from typing import ClassVar

from workbench.captured_generation import captured_prefill
from workbench.decoding import NotCapturedError, captured_or_eager, why_not_captured
from workbench.layer import State
from workbench.measuring import (
    CAPTURED,
    EAGER,
    MemoryPeak,
    Step,
    Stepper,
    Timing,
    decode_time,
    first_token_time,
    prefill_time,
)
from workbench.measuring_generation import Generation, generation_time
from workbench.measuring_memory import inference_memory, training_memory
from workbench.metric import Metric, Subject
from workbench.model import HybridLM
from workbench.training_config import TrainingConfig
from workbench_metrics.bounds import report_bound
from workbench_metrics.config import Decode, Generate, Peak, Prefill, Throughput
from workbench_metrics.predicted import report_prediction


class DecodeMilliseconds(Metric):
    """Median time of a decode step: what each sequence waits for its next token."""

    Config: ClassVar[type] = Decode
    unit = "ms"
    stage = "measured"
    label = "Decode time a token"

    def measure(self, subject: Subject) -> float:
        timing = _decode(subject, self.config)
        return timing.median * 1000


class PrefillMilliseconds(Metric):
    """Median time to take in a batch of prompts: the time to first token without sampling."""

    Config: ClassVar[type] = Prefill
    unit = "ms"
    stage = "measured"
    label = "Prefill time"

    def measure(self, subject: Subject) -> float:
        batch_size, length = self.config.batch_size, self.config.length
        timing = _prefill(subject, batch_size, length)
        _report(subject, timing)
        report_bound(subject, "prefill", batch_size, length, timing.median)
        report_prediction(subject, "prefill", batch_size, length)
        return timing.median * 1000


class TimeToFirstToken(Metric):
    """Median time from a batch of prompts to the first token drawn after each."""

    Config: ClassVar[type] = Prefill
    unit = "ms"
    stage = "measured"
    label = "Time to first token"

    def measure(self, subject: Subject) -> float:
        batch_size, length = self.config.batch_size, self.config.length
        timing = first_token_time(subject.built, batch_size, length)
        _report(subject, timing)
        report_bound(subject, "prefill", batch_size, length, timing.median)
        return timing.median * 1000


class TimePerOutputToken(Metric):
    """Median time of each token after the first in real generations, sampling included."""

    Config: ClassVar[type] = Generate
    unit = "ms"
    stage = "measured"
    label = "Time per output token"

    def measure(self, subject: Subject) -> float:
        timing = _generation(subject, self.config).per_token
        _report(subject, timing)
        batch_size, context = self.config.batch_size, self.config.context
        report_bound(subject, "decode", batch_size, context, timing.median)
        return timing.median * 1000


class GenerationTokensPerSecond(Metric):
    """Tokens of all sequences together, a second of whole generations: prefill included."""

    Config: ClassVar[type] = Generate
    unit = "tokens/s"
    direction = "maximize"
    stage = "measured"
    label = "Generation throughput, prefill included"

    def measure(self, subject: Subject) -> float:
        generation = _generation(subject, self.config)
        _report(subject, generation.total)
        return generation.tokens_per_second


class PeakMemoryBytes(Metric):
    """Bytes that tensors hold at the worst moment; CUDA devices only, refused elsewhere."""

    Config: ClassVar[type] = Peak
    unit = "bytes"
    stage = "measured"
    label = "Peak memory"

    def measure(self, subject: Subject) -> float:
        peak = self._peak(subject)
        subject.extras["reserved"] = peak.reserved
        return peak.allocated

    def _peak(self, subject: Subject) -> MemoryPeak:
        config = self.config
        if config.phase != "training":
            return inference_memory(subject.built, config.phase, config.batch_size, config.context)
        # A quantized model cannot be trained, and one that was measured must stay as it is.
        device = subject.built.device
        model = subject.builder.build(subject.layout, device=device)
        training = TrainingConfig(
            tokens=config.batch_size * config.context,
            batch_size=config.batch_size,
            seq_len=config.context,
        )
        return training_memory(model, training)


class TokensPerSecond(Metric):
    """Decode throughput: tokens of all sequences together, a second of the median step."""

    Config: ClassVar[type] = Throughput
    unit = "tokens/s"
    direction = "maximize"
    stage = "measured"
    label = "Decode throughput"

    def measure(self, subject: Subject) -> float:
        timing = _decode(subject, self.config)
        return self.config.batch_size / timing.median  # type: ignore[no-any-return]


def _decode(subject: Subject, config: Decode) -> Timing:
    timing = decode_time(
        subject.built,
        config.batch_size,
        config.context,
        config.tokens,
        stepper=_stepper(subject),
    )
    _report(subject, timing)
    report_bound(subject, "decode", config.batch_size, config.context, timing.median)
    report_prediction(subject, "decode", config.batch_size, config.context)
    return timing


def _generation(subject: Subject, config: Generate) -> Generation:
    return generation_time(
        subject.built,
        config.batch_size,
        config.context,
        config.tokens,
        stepper=_stepper(subject),
    )


def _prefill(subject: Subject, batch_size: int, length: int) -> Timing:
    """Captured where that works, as steps are; notes which it was."""
    try:
        timing = prefill_time(subject.built, batch_size, length, prefiller=captured_prefill)
        subject.notes["prefill"] = CAPTURED
    except NotCapturedError as error:
        timing = prefill_time(subject.built, batch_size, length)
        subject.notes["prefill"] = f"{EAGER}: {error}"
    return timing


def _stepper(subject: Subject) -> Stepper:
    """`captured_or_eager`; notes which it was."""

    def stepper(model: HybridLM, states: list[State], batch_size: int) -> Step:
        reason = why_not_captured(model, states)
        subject.notes["steps"] = f"eager: {reason}" if reason else CAPTURED
        return captured_or_eager(model, states, batch_size)

    return stepper


def _report(subject: Subject, timing: Timing) -> None:
    """Leave the spread of a timing, in ms a call, beside the figure."""
    subject.extras.update(
        p10_ms=timing.p10 * 1000,
        p90_ms=timing.p90 * 1000,
        spread=timing.spread,
        noisy=float(timing.noisy),
        repeats=timing.repeats,
    )
