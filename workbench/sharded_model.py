"""A model whose weights are spread over processes by rows: FSDP2, block by block.

Only the rows of a process are ever in its memory, and of a block that computes the whole (float32)
weights; the first process holds all weights once, while the initial ones are drawn.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from workbench.builder import Builder
from workbench.errors import WorkbenchError
from workbench.layout import Layout
from workbench.model import HybridLM
from workbench.sharded_processes import Processes


def build_sharded(
    builder: Builder, layout: Layout, processes: Processes, *, device: str, seed: int
) -> HybridLM:
    """What `Builder.build` makes, each process with its rows of every parameter.

    The initial weights are those of one process with the same seed and kind of device.

    Raises:
        WorkbenchError: a layer has a parameter without dimensions.
    """
    model = builder.build(layout, device="meta")
    where = torch.device(device)
    shard(model, init_device_mesh(where.type, (processes.count,)))
    model.to_empty(device=where)
    model.tie_weights()  # `to_empty` makes every name a parameter of its own
    whole = builder.build(layout, device=where, seed=seed) if processes.is_first else None
    fill(model, {} if whole is None else tensors_of(whole), processes)
    return model


def shard(model: HybridLM, mesh: DeviceMesh) -> None:
    """Make each parameter a DTensor of rows; a block's are gathered while it runs.

    A block that later ones build on keeps its whole weights from its forward to its backward
    pass: they compute with them, or send gradients into it before its own backward pass begins.

    Raises:
        WorkbenchError: a layer has a parameter without dimensions.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise WorkbenchError(
                f"{name} has no dimension to shard by: make it a tensor of shape [1] in its "
                "layer, or train in one process"
            )
    read = set(model.sources)
    for index, block in enumerate(model.blocks):
        fully_shard(block, mesh=mesh, reshard_after_forward=index not in read)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss")


def tensors_of(model: HybridLM) -> dict[str, Tensor]:
    """Parameters and buffers, shared ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def fill(model: HybridLM, whole: dict[str, Tensor], processes: Processes) -> None:
    """Give a sharded model the first process's tensors, one after the other.

    Args:
        whole: by name, in the first process; ignored in the others.
    """
    for name, tensor in tensors_of(model).items():
        tensor.copy_(rows(processes.spread(whole.get(name), tensor.device), tensor))


def rows(whole: Tensor, like: Tensor) -> Tensor:
    """Of a tensor that every process has, the rows that `like` holds; all where it holds all."""
    if not isinstance(like, DTensor):
        return whole
    mesh, placements = like.device_mesh, like.placements
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """The rows of this process, in the memory where they are; call it without gradients."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_rows(part: Tensor, like: Tensor) -> Tensor:
    """A plain tensor as the rows that this process holds of one of the shape of `like`."""
    assert isinstance(like, DTensor)
    return DTensor.from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


@torch.no_grad()
def gathered(tensors: dict[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Whole tensors on the CPU, copies, in the first process; nothing in the others."""
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = cast(Any, tensor).full_tensor() if isinstance(tensor, DTensor) else tensor
        if processes.is_first:
            whole[name] = full.detach().cpu().clone()
    return whole
