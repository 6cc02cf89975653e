"""Linear layers of a decode step on few rows: read at the memory's speed, the residual added.

A matrix times a handful of vectors is bound by reading the matrix, and at the sizes of small models
by the launch: a matrix product's kernels are made for other things. `few_rows` puts one kernel in
their place, in whatever layer, and `ResidualAdd` lets compiled blocks add the residual in it.

Shape suffixes: B rows, D inputs, N outputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from workbench.kernels import TORCH, Backend, Operation, choose, constant

HALF = (torch.float16, torch.bfloat16)
MAX_ROWS = 4  # with more, the rows are what takes time, and a matrix product's kernels win
MAX_INPUTS = 8192  # the kernel is unrolled along them
PROBE_TOLERANCE = 0.01


@torch.library.custom_op("workbench::linear_step", mutates_args=())
def linear_step(
    x_BD: Tensor, weight_ND: Tensor, bias_N: Tensor | None, residual_BN: Tensor | None
) -> Tensor:
    """`x @ weight.T + bias + residual`, `[B, N]`, rounded once; for CUDA."""
    from workbench.triton_linear_step import linear_step as kernel

    return kernel(x_BD, weight_ND, bias_N, residual_BN)


@linear_step.register_fake
def _(x_BD: Tensor, weight_ND: Tensor, bias_N: Tensor | None, residual_BN: Tensor | None) -> Tensor:
    return x_BD.new_empty((x_BD.shape[0], weight_ND.shape[0]))


@constant
def linear_step_backend(device_type: str, dtype: torch.dtype, inputs: int) -> str:
    """What a linear layer on few rows runs on: the own kernel or torch."""
    able = device_type == "cuda" and dtype in HALF and inputs % 8 == 0 and inputs <= MAX_INPUTS
    return choose("linear_step", ("triton",)) if able else TORCH


class FewRows(nn.Linear):
    """What a plain linear is inside of `few_rows`."""

    def forward(self, input: Tensor) -> Tensor:
        rows = input.numel() // self.in_features
        if input.dtype != self.weight.dtype or not 1 <= rows <= MAX_ROWS:
            return super().forward(input)
        y_BN: Tensor = linear_step(input.reshape(rows, -1), self.weight, self.bias, None)
        return y_BN.view(*input.shape[:-1], self.out_features)


@contextmanager
def few_rows(model: nn.Module, rows: int) -> Iterator[None]:
    """Let a model's plain linears run on the kernel for few rows inside of the `with`.

    Others keep what they do: subclasses, parametrized ones, and those with hooks.

    Args:
        rows: sequences of a step; with more than `MAX_ROWS` nothing changes.
    """
    swapped = [linear for linear in model.modules() if rows <= MAX_ROWS and _is_able(linear)]
    for linear in swapped:
        linear.__class__ = FewRows
    try:
        yield
    finally:
        for linear in swapped:
            linear.__class__ = nn.Linear


def _is_able(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return False
    if "forward" in vars(module) or not module.weight.is_contiguous():
        return False
    weight = module.weight
    return linear_step_backend(weight.device.type, weight.dtype, module.in_features) != TORCH


def residual_add() -> Any:
    """A pass of torch.compile's inductor: `residual + linear_step(x, ...)` becomes one kernel."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class ResidualAdd(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            fuse_residuals(graph)

        def uuid(self) -> Any:
            """What cached compilations depend on."""
            return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

    return ResidualAdd()


def fuse_residuals(graph: fx.Graph) -> None:
    """Let each `linear_step` whose result is only added to a tensor of its shape do the adding."""
    target = torch.ops.workbench.linear_step.default
    for node in graph.find_nodes(op="call_function", target=target):
        if node.args[3] is None and len(node.users) == 1:
            _take_in(graph, node, next(iter(node.users)))


def _take_in(graph: fx.Graph, linear: fx.Node, add: fx.Node) -> None:
    if add.target is not torch.ops.aten.add.Tensor or add.kwargs or len(add.args) != 2:
        return
    residual = add.args[0] if add.args[1] is linear else add.args[1]
    if not isinstance(residual, fx.Node) or residual is linear:
        return
    theirs, ours = residual.meta.get("val"), linear.meta.get("val")
    if not isinstance(theirs, Tensor) or not isinstance(ours, Tensor):
        return
    if (theirs.shape, theirs.dtype) != (ours.shape, ours.dtype):
        return
    with graph.inserting_before(add):
        fused = graph.call_function(linear.target, (*linear.args[:3], residual))  # type: ignore[arg-type]
    fused.meta.update(add.meta)
    add.replace_all_uses_with(fused)
    graph.erase_node(add)
    graph.erase_node(linear)


def _probe() -> None:
    """Run the kernel, and hold it against torch's."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator).bfloat16()

    for rows, inputs, outputs in ((1, 512, 6), (3, 776, 33), (4, 64, 9000)):
        x_BD, weight_ND, bias_N = random(rows, inputs), random(outputs, inputs), random(outputs)
        for residual_BN in (None, random(rows, outputs)):
            wanted = x_BD.float() @ weight_ND.float().t() + bias_N.float()
            wanted += 0.0 if residual_BN is None else residual_BN.float()
            found = linear_step(x_BD, weight_ND, bias_N, residual_BN)
            error = float((found.float() - wanted).norm() / wanted.norm())
            if not error < PROBE_TOLERANCE:
                raise RuntimeError(f"the kernel is off by {error:.1%} of torch's result")


LINEAR_STEP = Operation(
    "linear_step",
    [Backend(name="triton", probe=_probe, install="pip install triton")],
    home=__name__,
)
