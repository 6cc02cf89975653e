"""One pass over a validation part: loss, bits per byte, accuracy."""

from __future__ import annotations

import dataclasses
import math

import torch

from workbench.data import DataSource
from workbench.errors import WorkbenchError
from workbench.model import IGNORE, HybridLM


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Sums of one pass.

    Attributes:
        loss: mean cross entropy in nats a target.
        targets: how many targets carried a loss.
        correct: how many of them the most likely token hit.
        num_bytes: bytes of text the targets stand for; None for synthetic tasks.
    """

    loss: float
    targets: int
    correct: int
    num_bytes: float | None

    @property
    def perplexity(self) -> float:
        """exp(loss), a token; infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits of cross entropy a byte of text: comparable across vocabularies."""
        if self.num_bytes is None:
            raise WorkbenchError("bits per byte need a data source of text, not a synthetic task")
        return self.loss * self.targets / math.log(2) / self.num_bytes

    @property
    def accuracy(self) -> float:
        """Share of targets that the most likely token hits."""
        return self.correct / self.targets


@torch.no_grad()
def evaluate(model: HybridLM, data: DataSource, batch_size: int, length: int) -> Evaluation:
    """Judge `model` on the whole validation part of `data`.

    Raises:
        WorkbenchError: the validation part is empty at this batch size and length.
    """
    was_training = model.training
    model.eval()
    loss, targets, correct, num_bytes = 0.0, 0, 0, 0.0
    is_text = True
    for batch in data.validation_batches(batch_size, length):
        batch = batch.to(model.device)
        logits_BTV = model(batch.inputs_BT, batch.context).float()
        kept_BT = batch.targets_BT != IGNORE
        scores, wanted = logits_BTV[kept_BT], batch.targets_BT[kept_BT]
        loss += float(torch.nn.functional.cross_entropy(scores, wanted, reduction="sum").double())
        correct += int((scores.argmax(-1) == wanted).sum())
        targets += int(kept_BT.sum())
        is_text = is_text and batch.num_bytes is not None
        num_bytes += batch.num_bytes or 0.0
    model.train(was_training)
    if targets == 0:
        raise WorkbenchError(
            f"the validation part has no batch of length {length}: lower seq_len or add data"
        )
    return Evaluation(
        loss=loss / targets,
        targets=targets,
        correct=correct,
        num_bytes=num_bytes if is_text else None,
    )
