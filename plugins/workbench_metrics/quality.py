"""Quality on the whole validation part: bits per byte, perplexity, accuracy.

All share one evaluation a subject. Those of the quantized stage judge the weights as they will be
stored, which are those as trained wherever no quantizer is chosen.
"""

from __future__ import annotations

from workbench.data import Batch
from workbench.errors import WorkbenchError
from workbench.metric import Metric, Subject


class BitsPerByte(Metric):
    """Cross entropy in bits a byte of text: comparable across vocabularies and tokenizers.

    The perplexity is left beside it.
    """

    unit = "bits/byte"
    stage = "quantized"
    at_rungs = True
    label = "Bits per byte"

    def check(self, batch: Batch) -> None:
        _require_text(batch)

    def measure(self, subject: Subject) -> float:
        return _bits_per_byte(subject)


class BitsPerByteUnquantized(Metric):
    """Bits per byte before quantizing: the distance to `bits_per_byte` is what storing cost."""

    unit = "bits/byte"
    stage = "trained"
    label = "Bits per byte, weights as trained"

    def check(self, batch: Batch) -> None:
        _require_text(batch)

    def measure(self, subject: Subject) -> float:
        return _bits_per_byte(subject)


class Perplexity(Metric):
    """exp of the mean cross entropy a token; comparable only within one tokenizer."""

    unit = "per token"
    stage = "quantized"
    at_rungs = True
    label = "Perplexity"

    def measure(self, subject: Subject) -> float:
        return subject.evaluation.perplexity


class Accuracy(Metric):
    """Share of the targets that the most likely token hits: recall on synthetic tasks."""

    unit = "share"
    direction = "maximize"
    stage = "quantized"
    at_rungs = True
    label = "Accuracy"

    def measure(self, subject: Subject) -> float:
        return subject.evaluation.accuracy


def _require_text(batch: Batch) -> None:
    if batch.num_bytes is None:
        raise WorkbenchError(
            "bits per byte need text, and these tokens stand for none: use accuracy or perplexity"
        )


def _bits_per_byte(subject: Subject) -> float:
    figure = subject.evaluation.bits_per_byte
    subject.extras["perplexity"] = subject.evaluation.perplexity
    return figure
