"""Measured speed of the built model, on the device where the trial runs.

How it is timed is in `workbench.measuring`; each metric leaves the spread beside its median.
"""

from __future__ import annotations

from typing import ClassVar

from workbench.measuring import Timing, decode_time, prefill_time
from workbench.metric import Metric, Subject
from workbench_metrics.config import Decode, Prefill, Throughput


class DecodeMilliseconds(Metric):
    """Median time of a decode step: what each sequence waits for its next token."""

    Config: ClassVar[type] = Decode
    unit = "ms"
    stage = "measured"
    label = "Decode time a token"

    def measure(self, subject: Subject) -> float:
        timing = _decode(subject, self.config)
        _report(subject, timing)
        return timing.median * 1000


class PrefillMilliseconds(Metric):
    """Median time to take in a batch of prompts: the time to first token without sampling."""

    Config: ClassVar[type] = Prefill
    unit = "ms"
    stage = "measured"
    label = "Prefill time"

    def measure(self, subject: Subject) -> float:
        timing = prefill_time(subject.built, self.config.batch_size, self.config.length)
        _report(subject, timing)
        return timing.median * 1000


class TokensPerSecond(Metric):
    """Decode throughput: tokens of all sequences together, a second of the median step."""

    Config: ClassVar[type] = Throughput
    unit = "tokens/s"
    direction = "maximize"
    stage = "measured"
    label = "Decode throughput"

    def measure(self, subject: Subject) -> float:
        timing = _decode(subject, self.config)
        _report(subject, timing)
        return self.config.batch_size / timing.median  # type: ignore[no-any-return]


def _decode(subject: Subject, config: Decode) -> Timing:
    return decode_time(subject.built, config.batch_size, config.context, config.tokens)


def _report(subject: Subject, timing: Timing) -> None:
    """Leave the spread of a timing, in ms a call, beside the figure."""
    subject.extras.update(
        p10_ms=timing.p10 * 1000,
        p90_ms=timing.p90 * 1000,
        spread=timing.spread,
        noisy=float(timing.noisy),
        repeats=timing.repeats,
    )
