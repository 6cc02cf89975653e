"""Training one model in several processes, each with its rows of the weights and of the batch.

The tokens of a step, their order and the initial weights are those of one process, and so, to
rounding, is the curve. What layers add to the loss (`Context.add_loss`) is taken over a process's
own sequences and averaged: the same for a mean over tokens, nearly so for anything else.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from workbench.builder import Builder
from workbench.data import Batch, DataSource
from workbench.errors import FieldError, WorkbenchError
from workbench.evaluation import Evaluation
from workbench.layout import Layout
from workbench.model import IGNORE, HybridLM
from workbench.sharded_launch import Alone
from workbench.sharded_model import as_rows, build_sharded, gathered, local, rows
from workbench.sharded_optimizers import ShardedParameters
from workbench.sharded_processes import Processes, check_launcher, leave_quietly, own_device
from workbench.train_step import StepOptions, TrainStep
from workbench.training import DivergedError, Progress, TrainingResult, TrainingRun, save_state
from workbench.training_config import TrainingConfig

T = TypeVar("T")

NEIGHBOURS_FIRST = 3.0  # seconds
NOT_CAPTURED = "steps of several processes are not captured"


def check_batch_size(batch_size: int, processes: Processes) -> None:
    """Refuse a batch that cannot be dealt out evenly.

    Raises:
        FieldError: says which sizes can.
    """
    spare = batch_size % processes.count
    if spare:
        fitting = {batch_size - spare, batch_size - spare + processes.count} - {0}
        raise FieldError(
            "batch_size",
            f"{batch_size} sequences a step cannot be dealt out evenly to {processes.count} "
            f"processes: take {' or '.join(map(str, sorted(fitting)))}, or another number of "
            "processes",
        )


def share_of(batch: Batch, processes: Processes) -> Batch:
    """The sequences of this process.

    The last processes get fewer of a batch that does not divide; where none is left, one whose
    targets carry no loss, because all processes must compute together.
    """
    size = -(-len(batch.inputs_BT) // processes.count)
    part = slice(processes.rank * size, (processes.rank + 1) * size)
    is_left = part.start < len(batch.inputs_BT)
    part = part if is_left else slice(0, 1)
    context = {
        field.name: value[part]
        for field in dataclasses.fields(batch.context)
        if (value := getattr(batch.context, field.name)) is not None
    }
    targets_BT = batch.targets_BT[part]
    return dataclasses.replace(
        batch,
        inputs_BT=batch.inputs_BT[part],
        targets_BT=targets_BT if is_left else torch.full_like(targets_BT, IGNORE),
        context=dataclasses.replace(batch.context, **context),
    )


class ShardedStep(TrainStep):
    """A step on this process's sequences, whose update is the whole batch's."""

    def __init__(
        self,
        model: HybridLM,
        optimizers: list[torch.optim.Optimizer],
        options: StepOptions,
        parameters: ShardedParameters,
        processes: Processes,
    ) -> None:
        super().__init__(model, optimizers, dataclasses.replace(options, captured=False))
        self.note = NOT_CAPTURED if options.captured else ""
        self.parameters, self.processes = parameters, processes

    def _run(self, batch: Batch) -> Tensor:
        count = self.processes.count
        share = share_of(batch, self.processes)
        with torch.autocast(
            self.model.device.type, dtype=torch.bfloat16, enabled=self.options.half
        ):
            added: list[Tensor] = []
            context = dataclasses.replace(share.context, losses=added)
            total = self.model.loss(share.inputs_BT, share.targets_BT, context, reduction="sum")
        # Targets that carry no loss may lie unevenly: only all of them make the mean. FSDP divides
        # the sum of all processes' gradients by their number.
        loss = total * (count / (batch.targets_BT != IGNORE).sum())
        sum(added, loss).backward()  # type: ignore[no-untyped-call]
        self.parameters.take_gradients()
        if self.options.grad_clip:
            self.parameters.clip(self.options.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        mean = loss.detach() / count
        dist.all_reduce(mean)
        return mean


class ShardedRun(TrainingRun):
    """A `TrainingRun` in several processes.

    Its checkpoint is that of one process: a run may go on in another number of them.
    """

    def __init__(
        self, model: HybridLM, data: DataSource, config: TrainingConfig, processes: Processes
    ) -> None:
        self.processes = processes
        self.parameters = ShardedParameters(model)
        super().__init__(model, data, config)

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        return self.parameters.optimizers(self.model, self.config, self.processes)

    def _make_step(self, options: StepOptions) -> TrainStep:
        return ShardedStep(self.model, self.optimizers, options, self.parameters, self.processes)

    def _agreed(self, choice: bool) -> bool:
        return self.processes.agreed(choice)

    def _whole(self, name: str) -> Tensor | None:
        """The DTensor whose rows a tensor of the checkpoint has; None for one without rows."""
        kind, _, rest = name.partition(".")
        if kind != "optimizer":
            return None
        index, key, _ = rest.split(".", 2)
        groups = self.optimizers[int(index)].param_groups
        return self.parameters.whole([p for group in groups for p in group["params"]][int(key)])

    def _state(self) -> dict[str, Tensor]:
        tensors = super()._state()
        for name, tensor in tensors.items():
            whole = self._whole(name)
            if whole is not None and tensor.dim():
                tensors[name] = as_rows(tensor, whole)
        return tensors

    def save(self, path: Path) -> None:
        tensors = gathered(self._state(), self.processes)
        if self.processes.is_first:
            self._write(path, tensors)

    def load(self, path: Path) -> None:
        found = self.processes.first(lambda: self._read(path, "cpu"))
        wholes, progress = found or ({}, {})
        progress, names = self.processes.tell([progress, list(wholes)])
        state = super()._state()  # the model's; the optimizers have none yet
        parts: dict[str, Tensor] = {}
        with torch.no_grad():
            for name in names:
                tensor = self.processes.spread(wholes.pop(name, None), self.model.device)
                like = self._whole(name) if tensor.dim() else None
                parts[name] = rows(tensor, state.get(name, tensor))
                if like is not None:
                    parts[name] = local(rows(tensor, like))
        self._restore(parts, progress)


@torch.no_grad()
def evaluate_sharded(
    model: HybridLM, data: DataSource, batch_size: int, length: int, processes: Processes
) -> Evaluation:
    """`evaluate`, each process on its sequences.

    Raises:
        WorkbenchError: the validation part is empty at this batch size and length.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=model.device)
    is_text = True
    for batch in data.validation_batches(batch_size, length):
        is_text = is_text and batch.num_bytes is not None
        sums[:3] += _sums(model, share_of(batch.to(model.device), processes))
        sums[3] += (batch.num_bytes or 0.0) if processes.is_first else 0.0
    dist.all_reduce(sums)
    loss, targets, correct, num_bytes = sums.tolist()
    if not targets:
        raise WorkbenchError(
            f"the validation part has no batch of length {length}: lower seq_len or add data"
        )
    return Evaluation(
        loss=loss / targets,
        targets=int(targets),
        correct=int(correct),
        num_bytes=num_bytes if is_text else None,
    )


def _sums(model: HybridLM, batch: Batch) -> Tensor:
    """Of the losses, the targets that carry one, and those that the most likely token hits."""
    logits_BTV = model(batch.inputs_BT, batch.context).float()
    kept_BT = batch.targets_BT != IGNORE
    scores, wanted = logits_BTV[kept_BT], batch.targets_BT[kept_BT]
    loss = torch.nn.functional.cross_entropy(scores, wanted, reduction="sum")
    return torch.stack([loss, kept_BT.sum(), (scores.argmax(-1) == wanted).sum()])


class Sharded(Alone):
    """A training in this process and the others that a launcher started."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.count = processes.count
        self.is_first = processes.is_first

    def everywhere(self, function: Callable[[], T]) -> T:
        return self.processes.everywhere(function)

    def first(self, function: Callable[[], T]) -> T | None:
        return self.processes.first(function)

    def in_turn(self, function: Callable[[], T]) -> T:
        return self.processes.in_turn(function)

    def check(self, config: TrainingConfig) -> None:
        check_batch_size(config.batch_size, self.processes)
        check_launcher(config.precision)

    def device(self, name: str) -> str:
        return own_device(name, self.processes)

    def bytes_needed(self, parameters: int, device: str) -> int:
        beside = self.processes.local_count if device == "cpu" else 1  # who share the memory
        held = -(-parameters * beside // self.count)
        # While all initial weights are drawn, by the first process, there is nothing else yet.
        return max(12 * held, 4 * (held + parameters))

    def build(self, builder: Builder, layout: Layout, *, device: str, seed: int) -> HybridLM:
        return build_sharded(builder, layout, self.processes, device=device, seed=seed)

    def train(
        self,
        model: HybridLM,
        data: DataSource,
        config: TrainingConfig,
        *,
        checkpoint: Path | None = None,
        progress: Progress | None = None,
    ) -> TrainingResult:
        run = ShardedRun(model, data, config, self.processes)
        try:
            return run.complete(checkpoint, progress, None)
        except DivergedError:
            if not self.is_first:
                leave_quietly()  # all see the same loss
            raise
        except Exception:
            # A neighbour's end looks like a broken connection: most likely it has said why, and
            # the launcher ends this process now.
            time.sleep(NEIGHBOURS_FIRST)
            raise

    def evaluate(
        self, model: HybridLM, data: DataSource, batch_size: int, length: int
    ) -> Evaluation:
        return evaluate_sharded(model, data, batch_size, length, self.processes)

    def save_weights(self, model: HybridLM, path: Path, metadata: dict[str, str]) -> None:
        state = model.state_dict()
        for name in model.tied.keys() & state.keys():
            del state[name]
        whole = gathered(state, self.processes)
        self.first(lambda: save_state(whole, path, metadata))
