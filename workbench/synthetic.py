"""Synthetic tasks as cheap signals: a fresh model of a trial's layout, trained on something small.

What a metric of the synthetic stage does, as MAD does for its tasks (Poli et al., 2024,
arXiv:2403.17844): the trial's own model, data and random numbers stay as they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Iterator

import numpy
import torch

from workbench import sanity
from workbench.data import DataSource
from workbench.evaluation import Evaluation, evaluate
from workbench.metric import Subject
from workbench.training import DivergedError, train
from workbench.training_config import TrainingConfig


def learn(subject: Subject, task: DataSource, config: TrainingConfig) -> Evaluation:
    """How well a fresh model of a subject's layout does on a task's validation part after training.

    It has the task's vocabulary, and all else of the layout; weights are as trained, none
    quantized. On the subject's device it runs as the study's training does (precision, captured
    steps, recomputed blocks), but is not compiled, which would take longer than it does. The same
    layout, task and seed give the same figures on the same machine.

    Args:
        subject: its layout, device, seed and training count; it needs no model and no data.
        config: of the task's training.

    Raises:
        DivergedError: a loss is NaN or infinite; names the block where one is to blame.
        FieldError: sequences of that length cannot hold the task.
    """
    own = subject.training or config
    config = dataclasses.replace(
        config,
        precision=own.precision,
        compile="off",
        cuda_graph=own.cuda_graph,
        checkpoint_blocks=own.checkpoint_blocks,
        checkpoint_seconds=0.0,
        record_every=max(1, config.steps // 20),  # each is a wait for the device
    )
    layout = subject.layout.replace(vocab_size=task.vocab_size)
    model = subject.builder.build(layout, device=subject.device, seed=subject.seed)
    with own_generators(subject.seed, model.device):
        try:
            train(model, task, config)
            found = evaluate(model, task, config.batch_size, config.seq_len)
            if not math.isfinite(found.loss):
                raise DivergedError(f"validation loss is {found.loss}")
        except DivergedError as error:
            block = sanity.culprit(subject.builder, model, config.seq_len)
            raise DivergedError(f"{type(task).__name__}: {error}{block}") from None
    return found


@contextlib.contextmanager
def own_generators(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, random numbers are drawn from a seed; outside, as if nothing had been."""
    before = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            numpy.random.set_state(before[1])
