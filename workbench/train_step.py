"""One optimizer step, as fast as the device allows: eager, compiled, or replayed as a CUDA graph.

On a CUDA device the blocks are compiled, and once a few steps have run, the whole step (forward,
backward, clipping, update) is captured and from then on replayed: small models are bound by the
launching of kernels, which a replay does without.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from workbench.compilation import compiled_blocks, preparing
from workbench.data import Batch
from workbench.model import HybridLM
from workbench.optimizers import set_lr

WARMUP = 3  # steps before the capture: kernels are tuned and optimizer states made in them


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How a step runs.

    Attributes:
        half: products in bfloat16 (autocast); weights, sums and optimizer stay float32.
        grad_clip: largest norm of all gradients together; 0 does not clip.
        compiled: compile the blocks.
        captured: replay steps as a CUDA graph, where the batches are plain and of one shape.
        checkpointed: keep each block's input alone, and compute the rest again for the gradients.
    """

    half: bool
    grad_clip: float
    compiled: bool
    captured: bool
    checkpointed: bool = False


@dataclasses.dataclass(frozen=True)
class _Captured:
    """A recorded step: what it reads, and what it leaves."""

    graph: torch.cuda.CUDAGraph
    inputs_BT: Tensor
    targets_BT: Tensor
    loss: Tensor

    def fits(self, batch: Batch) -> bool:
        """Whether a batch is like the one that was captured: all else a replay would not see."""
        return batch.is_plain and batch.inputs_BT.shape == self.inputs_BT.shape


class TrainStep:
    """Trains a model by calls; see `running`.

    Attributes:
        mode: what the last step was: `eager`, `compiled` or `cuda graph`.
        note: why it is not captured though it should be; empty otherwise.
    """

    def __init__(
        self, model: HybridLM, optimizers: list[torch.optim.Optimizer], options: StepOptions
    ) -> None:
        self.model, self.optimizers, self.options = model, optimizers, options
        self.mode, self.note = "eager", ""
        self._done = 0
        self._captured: _Captured | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """What must stand while steps are run; frees the captured step afterwards."""
        compiled = self.options.compiled
        self.model.checkpointed = self.options.checkpointed
        device = self.model.device
        with (
            torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
            compiled_blocks(self.model, "forward") if compiled else nullcontext(),
        ):
            try:
                yield
            finally:
                self._captured = None
                self.model.checkpointed = False
                self._zero_grad()

    def __call__(self, batch: Batch, lr: float) -> Tensor:
        """Run one step on a batch (on any device); the loss in nats, on the model's device.

        The next step overwrites the loss: read it, or copy it, before.
        """
        set_lr(self.optimizers, lr)
        if self._captured is None and self._should_capture(batch):
            with preparing(self.model.device):
                self._captured = self._capture(batch)
        captured = self._captured
        if captured is None or not captured.fits(batch):
            self.mode = "compiled" if self.options.compiled else "eager"
            self._zero_grad()  # a replay leaves its gradients behind
            with self._first_calls():
                loss = self._run(batch.to(self.model.device))
            self._zero_grad()
            self._done += 1
            return loss
        self.mode = "cuda graph"
        captured.inputs_BT.copy_(batch.inputs_BT, non_blocking=True)
        captured.targets_BT.copy_(batch.targets_BT, non_blocking=True)
        captured.graph.replay()
        return captured.loss

    def _first_calls(self) -> AbstractContextManager[None]:
        """The first steps of a kind that is made for speed are `preparing`, no measure of it."""
        fast = self.options.compiled or self.options.captured
        return preparing(self.model.device) if fast and self._done < WARMUP else nullcontext()

    def _run(self, batch: Batch) -> Tensor:
        """A step up to the update; gradients are left behind."""
        device = self.model.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.options.half):
            added: list[Tensor] = []
            context = dataclasses.replace(batch.context, losses=added)
            loss = self.model.loss(batch.inputs_BT, batch.targets_BT, context)
        sum(added, loss).backward()  # type: ignore[no-untyped-call]
        if self.options.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def _should_capture(self, batch: Batch) -> bool:
        if not self.options.captured or self._done < WARMUP:
            return False
        self.note = ""
        if any(layer.host_synchronized for layer in self.model.layers):
            names = {type(x).__name__ for x in self.model.layers if x.host_synchronized}
            self.note = f"{', '.join(sorted(names))} waits for the device within a step"
        elif not batch.is_plain:
            self.note = "batches carry masks, borders or prefixes, whose sizes may change"
        return not self.note

    def _capture(self, batch: Batch) -> _Captured:
        """Record the step; nothing runs, and the weights stay as they are."""
        device = self.model.device
        inputs_BT = batch.inputs_BT.to(device, copy=True)
        targets_BT = batch.targets_BT.to(device, copy=True)
        static = dataclasses.replace(batch, inputs_BT=inputs_BT, targets_BT=targets_BT)
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            loss = self._run(static)
        return _Captured(graph, inputs_BT, targets_BT, loss)
