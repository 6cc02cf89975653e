"""Training batches made ahead of the step that needs them, in a thread of their own."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

from workbench.data import Batch, DataSource
from workbench.training_config import TrainingConfig

AHEAD = 2  # batches in the making while a step runs


def upcoming_batches(
    data: DataSource, config: TrainingConfig, start: int, *, end: int | None = None, pin: bool
) -> Generator[Batch, None, None]:
    """The batches of the steps from `start` up to `end`, which is not one of them.

    Args:
        end: None for the end of the budget.
        pin: make them ahead, in page-locked memory, from where a GPU copies without waiting.
            Without it each is made when it is asked for: on a CPU the step wants every core.
    """

    end = config.steps if end is None else end

    def make(step: int) -> Batch:
        batch = data.train_batch(step, config.batch_size, config.seq_len)
        return batch.pinned() if pin else batch

    if not pin:
        for step in range(start, end):
            yield make(step)
        return
    with ThreadPoolExecutor(1, "workbench-batches") as pool:
        waiting = [pool.submit(make, step) for step in range(start, end)[:AHEAD]]
        try:
            for step in range(start, end):
                batch = waiting.pop(0).result()
                if step + AHEAD < end:
                    waiting.append(pool.submit(make, step + AHEAD))
                yield batch
        finally:
            for future in waiting:
                future.cancel()
