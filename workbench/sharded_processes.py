"""The processes that a launcher started for one training run, and what they say to one another.

`torchrun` and `accelerate launch` start equal processes that differ in environment variables
alone: `RANK`, `LOCAL_RANK`, `WORLD_SIZE` and where they meet.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from workbench.errors import FieldError, WorkbenchError

T = TypeVar("T")

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = 20.0  # seconds in which a launcher ends a process whose neighbour failed

# What `accelerate launch` may ask for: variable → option, the values that change nothing here.
ASKED = {
    "ACCELERATE_USE_DEEPSPEED": ("--use_deepspeed", ("false",)),
    "ACCELERATE_USE_MEGATRON_LM": ("--use_megatron_lm", ("false",)),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("--use_parallelism_config", ("false",)),
    "ACCELERATE_DYNAMO_BACKEND": ("--dynamo_backend", ("no",)),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("--gradient_accumulation_steps", ("1",)),
    "FSDP_OFFLOAD_PARAMS": ("--fsdp_offload_params", ("false",)),
    "FSDP_SHARDING_STRATEGY": ("--fsdp_sharding_strategy", ("full_shard", "1")),
    "FSDP_RESHARD_AFTER_FORWARD": ("--fsdp_reshard_after_forward", ("true", "full_shard")),
    "FSDP_ACTIVATION_CHECKPOINTING": ("--fsdp_activation_checkpointing", ("false",)),
}
INSTEAD = {
    "FSDP_ACTIVATION_CHECKPOINTING": "give workbench train --checkpoint-blocks",
    "ACCELERATE_DYNAMO_BACKEND": "workbench train compiles blocks by itself",
}
PRECISIONS = {"no": "", "bf16": "bfloat16"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those of a run.

    Attributes:
        rank, count: its number among all, and how many they are.
        local_rank, local_count: the same among those of its machine.
    """

    rank: int
    count: int
    local_rank: int
    local_count: int

    @property
    def is_first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def everywhere(self, function: Callable[[], T]) -> T:
        """What `function` returns here, once it has ended well in every process.

        Raises:
            Exception: what it raised here, if here is the first process where it failed.
            SystemExit: it failed in another one, too, which says why.
        """
        error, result = None, None
        try:
            result = function()
        except Exception as caught:
            error = caught
        failed = torch.tensor([self.count if error is None else self.rank])
        dist.all_reduce(failed, dist.ReduceOp.MIN)
        if error is not None and int(failed) == self.rank:
            raise error
        if int(failed) < self.count:
            leave_quietly()
        return result  # type: ignore[return-value]

    def first(self, function: Callable[[], T]) -> T | None:
        """Run `function` in the first process while the others wait; None in these."""
        return self.everywhere(lambda: function() if self.is_first else None)

    def in_turn(self, function: Callable[[], T]) -> T:
        """Run `function` in each machine's first process, then in the others: it may fill a cache.

        Returns:
            What it returned here.
        """
        early = self.everywhere(lambda: function() if self.local_rank == 0 else None)
        late = self.everywhere(lambda: function() if self.local_rank != 0 else None)
        return early if self.local_rank == 0 else late  # type: ignore[return-value]

    def agreed(self, choice: bool) -> bool:
        """The first process's choice."""
        chosen = torch.tensor([choice])
        dist.broadcast(chosen, 0)
        return bool(chosen)

    def tell(self, data: Any) -> Any:
        """The first process's JSON data; what the others give is ignored."""
        text = torch.frombuffer(bytearray(json.dumps(data).encode()), dtype=torch.uint8)
        length = torch.tensor([len(text)])
        dist.broadcast(length, 0)
        text = text if self.is_first else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(text, 0)
        return json.loads(bytes(text.tolist()))

    def spread(self, tensor: Tensor | None, device: torch.device) -> Tensor:
        """The first process's tensor, on `device`; the others may give None."""
        header = tensor is not None and [str(tensor.dtype).removeprefix("torch."), *tensor.shape]
        dtype, *shape = self.tell(header)
        if tensor is None or not self.is_first:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        tensor = tensor.detach().to(device).contiguous()
        dist.broadcast(tensor, 0)
        return tensor


def leave_quietly() -> NoReturn:
    """End because another process failed, which says why.

    The launcher ends all once one has ended, in the middle of its last words if need be: so this
    one waits until that has happened to the other.

    Raises:
        SystemExit: the launcher let it live.
    """
    time.sleep(PATIENCE)
    raise SystemExit(1)


def launched(environment: Mapping[str, str] = os.environ) -> Processes | None:
    """This process among those that a launcher started; None if it is alone.

    Raises:
        WorkbenchError: a launcher started several, and does not say how they meet.
    """
    if environment.get("WORLD_SIZE", "1") == "1" or "LOCAL_RANK" not in environment:
        return None  # a cluster's WORLD_SIZE without a rank here is meant for a launcher
    missing = [name for name in VARIABLES if name not in environment]
    if missing:
        raise WorkbenchError(
            f"WORLD_SIZE and LOCAL_RANK are set, {', '.join(missing)} not: start the processes "
            "with accelerate launch or torchrun, or unset WORLD_SIZE to train in one"
        )
    try:
        return Processes(
            rank=int(environment["RANK"]),
            count=int(environment["WORLD_SIZE"]),
            local_rank=int(environment["LOCAL_RANK"]),
            local_count=int(environment["LOCAL_WORLD_SIZE"]),
        )
    except ValueError as error:
        names = ", ".join(VARIABLES[:4])
        raise WorkbenchError(f"{names} must be numbers, as launchers set them: {error}") from None


@contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes of a launcher can speak to one another.

    CPU tensors go through gloo, so that deciding something together waits for no GPU; a GPU's
    through NCCL.
    """
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    yield
    # After an error the others may be waiting for something else: leaving is the launcher's work.
    dist.destroy_process_group()


def own_device(name: str, processes: Processes, environment: Mapping[str, str] = os.environ) -> str:
    """The device of this process: by default the GPU of its local rank, else the CPU.

    Args:
        name: what the user asked for: auto, cpu or cuda.

    Raises:
        FieldError: another name, or fewer GPUs than processes.
    """
    on_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if name == "cpu" or (name == "auto" and (on_cpu or not torch.cuda.is_available())):
        return "cpu"
    if name not in ("auto", "cuda"):
        raise FieldError(
            "device", f"{name!r}: each process takes a device of its own; leave it out, or say cpu"
        )
    there = torch.cuda.device_count()
    if processes.local_count > there:
        raise FieldError(
            "device",
            f"{processes.local_count} processes and {there} CUDA devices: lower the launcher's "
            "number of processes, or say --device cpu",
        )
    torch.cuda.set_device(processes.local_rank)
    return f"cuda:{processes.local_rank}"


def check_launcher(precision: str, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse what `accelerate launch` was asked for and would not be done.

    Args:
        precision: of `TrainingConfig`.

    Raises:
        WorkbenchError: names the launcher's option and what to give instead.
    """
    mixed = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if PRECISIONS.get(mixed) not in ("", precision):
        raise WorkbenchError(
            f"accelerate launch was given --mixed_precision {mixed}, and workbench train computes "
            f"in {precision}: leave the launcher's out, and give workbench train --precision "
            "bfloat16 if that is what you want"
        )
    for variable, (option, harmless) in ASKED.items():
        value = environment.get(variable, harmless[0])
        if value.lower() not in harmless:
            instead = f", {INSTEAD[variable]}" if variable in INSTEAD else ""
            raise WorkbenchError(
                f"accelerate launch was given {option} {value}, which workbench train does not "
                f"do: leave it out (or out of accelerate's config file){instead}"
            )
