"""How many processes train a model: this one alone, or those that a launcher started."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

if TYPE_CHECKING:
    from workbench.builder import Builder
    from workbench.data import DataSource
    from workbench.evaluation import Evaluation
    from workbench.layout import Layout
    from workbench.model import HybridLM
    from workbench.training import Progress, TrainingResult
    from workbench.training_config import TrainingConfig

T = TypeVar("T")


class Alone:
    """A training in one process; `sharded_training.Sharded` is its counterpart in several.

    Attributes:
        count: of processes.
        is_first: whether this one prints and writes.
    """

    count = 1
    is_first = True

    def everywhere(self, function: Callable[[], T]) -> T:
        """What `function` returns here, once it has ended well in every process.

        Raises:
            Exception: what it raised, in the first process where it failed.
            SystemExit: in the others.
        """
        return function()

    def first(self, function: Callable[[], T]) -> T | None:
        """Run `function` in the first process while the others wait; None in these."""
        return function()

    def in_turn(self, function: Callable[[], T]) -> T:
        """Run `function` in each machine's first process, then in the others: it may fill a cache.

        Returns:
            What it returned here.
        """
        return function()

    def check(self, config: TrainingConfig) -> None:
        """Refuse what these processes cannot do, or what their launcher wants otherwise.

        Raises:
            WorkbenchError: says what to give instead.
        """
        if "ACCELERATE_MIXED_PRECISION" in os.environ:  # accelerate launch, of one process
            from workbench.sharded_processes import check_launcher

            check_launcher(config.precision)

    def device(self, name: str) -> str:
        """The device of this process.

        Args:
            name: as the user gave it.

        Raises:
            FieldError: not a device, or not there.
        """
        from workbench.environment import resolve_device

        return resolve_device(name)

    def bytes_needed(self, parameters: int, device: str) -> int:
        """The least bytes on a device: weights, gradients and at least one moment a weight."""
        return 12 * parameters

    def build(self, builder: Builder, layout: Layout, *, device: str, seed: int) -> HybridLM:
        """The model with its initial weights, or this process's rows of them."""
        return builder.build(layout, device=device, seed=seed)

    def train(
        self,
        model: HybridLM,
        data: DataSource,
        config: TrainingConfig,
        *,
        checkpoint: Path | None = None,
        progress: Progress | None = None,
    ) -> TrainingResult:
        """Train to the end of the budget, from the checkpoint if there is one (`train`).

        Raises:
            DivergedError: a loss that is NaN or infinite.
            WorkbenchError: the checkpoint is of another run, or cannot be written.
        """
        from workbench.training import train

        return train(model, data, config, checkpoint=checkpoint, progress=progress)

    def evaluate(
        self, model: HybridLM, data: DataSource, batch_size: int, length: int
    ) -> Evaluation:
        """Judge the model on the whole validation part.

        Raises:
            WorkbenchError: the validation part is empty at this batch size and length.
        """
        from workbench.evaluation import evaluate

        return evaluate(model, data, batch_size, length)

    def save_weights(self, model: HybridLM, path: Path, metadata: dict[str, str]) -> None:
        """Write the whole weights as one safetensors file."""
        from workbench.training import save_weights

        save_weights(model, path, metadata)


@contextmanager
def started() -> Iterator[Alone]:
    """The processes of this training, those of a launcher joined.

    Raises:
        WorkbenchError: a launcher started several, and does not say how they meet.
    """
    if "WORLD_SIZE" not in os.environ:  # what loads torch for one process can wait
        yield Alone()
        return
    from workbench.sharded_processes import joined, launched

    processes = launched()
    if processes is None:
        yield Alone()
        return
    from workbench.sharded_training import Sharded

    with joined():
        if not processes.is_first:  # the first one says what Ctrl-C means
            signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
        yield Sharded(processes)


def leave(status: int) -> NoReturn:
    """End a process that has spoken to others, without Python's own clearing up.

    gloo's threads outlive `destroy_process_group` (torch 2.13). One that lets go of a tensor while
    Python is clearing up ends the process with SIGABRT, and the launcher calls the run failed.
    What was registered with `atexit` runs; threads are not waited for.
    """
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)
