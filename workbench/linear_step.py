"""Linear layers of a decode step on few rows: norm, matrix and residual in one kernel.

A matrix times a handful of vectors is bound by reading the matrix, and at the sizes of small models
by the launch: a matrix product's kernels are made for other things. `few_rows` puts one kernel in
their place, in whatever layer, and `fusion` lets compiled blocks norm its input and add the
residual in it.

Shape suffixes: B rows, D inputs, N outputs.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from workbench.kernels import TORCH, Backend, Operation, choose, constant

HALF = (torch.float16, torch.bfloat16)
MAX_ROWS = 4  # with more, the rows are what takes time, and a matrix product's kernels win
MAX_INPUTS = 8192  # the kernel is unrolled along them
MAX_NORMED = 4096  # inputs that a program of the kernel holds at once
PROBE_TOLERANCE = 0.01
_aten = torch.ops.aten
VIEWS = (_aten.view.default, _aten.reshape.default, _aten.unsqueeze.default, _aten.squeeze.dim)


@torch.library.custom_op("workbench::linear_step", mutates_args=())
def linear_step(
    x_BD: Tensor,
    weight_ND: Tensor,
    bias_N: Tensor | None,
    residual_BN: Tensor | None,
    norm_D: Tensor | None,
    eps: float,
) -> Tensor:
    """`norm(x) @ weight.T + bias + residual`, `[B, N]`, rounded once; for CUDA.

    Args:
        weight_ND, bias_N, norm_D: parameters, which may be read early (`triton_launch`).
        norm_D: weights of an RMSNorm of x, or None for x itself.
    """
    from workbench.triton_linear_step import linear_step as kernel

    return kernel(x_BD, weight_ND, bias_N, residual_BN, norm_D, eps)


@linear_step.register_fake
def _(
    x_BD: Tensor,
    weight_ND: Tensor,
    bias_N: Tensor | None,
    residual_BN: Tensor | None,
    norm_D: Tensor | None,
    eps: float,
) -> Tensor:
    return x_BD.new_empty((x_BD.shape[0], weight_ND.shape[0]))


@torch.library.custom_op("workbench::norm_step", mutates_args=())
def norm_step(x_BD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm of rows, `[B, D]`: a mark for `fuse_norms`, which leaves none of them."""
    return F.rms_norm(x_BD, weight_D.shape, weight_D, eps)


@norm_step.register_fake
def _(x_BD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x_BD)


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
        x_BD = input if input.ndim == 2 else input.reshape(rows, -1)
        y_BN: Tensor = linear_step(x_BD, self.weight, self.bias, None, None, 0.0)
        return y_BN if input.ndim == 2 else y_BN.view(*input.shape[:-1], self.out_features)


class FewRowsNorm(nn.RMSNorm):
    """What an RMSNorm is inside of `few_rows`: in a compiled block a mark for `fuse_norms`."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.dtype != self.weight.dtype or not torch.compiler.is_compiling():
            return super().forward(x)
        eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps  # as torch's
        y_BD: Tensor = norm_step(x, self.weight, eps)
        return y_BD


@contextmanager
def few_rows(model: nn.Module, rows: int) -> Iterator[None]:
    """Let a model's plain linears run on the kernel for few rows inside of the `with`.

    Others keep what they do: subclasses, parametrized ones, and those with hooks.

    Args:
        rows: sequences of a step; with more than `MAX_ROWS` nothing changes.
    """
    swapped: list[nn.Module] = []
    try:
        for module in model.modules() if rows <= MAX_ROWS else ():
            if kind := _few_rows_kind(module):
                swapped.append(module)
                module.__class__ = kind
        yield
    finally:
        for module in swapped:
            module.__class__ = type(module).__mro__[1]


KINDS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FewRows, nn.RMSNorm: FewRowsNorm}


def _few_rows_kind(module: nn.Module) -> type[nn.Module] | None:
    """What a module becomes inside of `few_rows`; None for what it is."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return None
    weight, kind = getattr(module, "weight", None), KINDS.get(type(module))
    if kind is None or weight is None or not weight.is_contiguous():
        return None
    inputs = weight.shape[-1]
    if kind is FewRowsNorm and (weight.ndim != 1 or inputs > MAX_NORMED):
        return None
    found = linear_step_backend(weight.device.type, weight.dtype, inputs)
    return None if found == TORCH else kind


def fusion() -> Any:
    """A pass of torch.compile's inductor: norm, linear and residual of few rows become one."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Fusion(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            fuse_norms(graph)
            fuse_residuals(graph)

        def uuid(self) -> Any:
            """What cached compilations depend on."""
            return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

    return Fusion()


def fuse_norms(graph: fx.Graph) -> None:
    """Let linears norm their inputs themselves; a norm that others read, too, is torch's again."""
    operators = torch.ops.workbench
    linear_op, norm_op = operators.linear_step.default, operators.norm_step.default
    for linear in graph.find_nodes(op="call_function", target=linear_op):
        norm = _unviewed(linear.args[0])
        if norm.target is norm_op and linear.args[4] is None:
            x, weight, eps = norm.args
            linear.args = (x, *linear.args[1:4], weight, eps)
    graph.eliminate_dead_code()  # views
    for norm in graph.find_nodes(op="call_function", target=norm_op):
        with graph.inserting_before(norm):
            norm.replace_all_uses_with(_plain_norm(graph, norm))
        graph.erase_node(norm)


def _unviewed(rows: Any) -> fx.Node:
    """What rows are a view of, if it has their shape; else these themselves.

    Views keep the order of elements: of equal shape, they are equal.
    """
    node = rows
    while node.target in VIEWS:
        node = node.args[0]
    return node if node.meta["val"].shape == rows.meta["val"].shape else rows  # type: ignore[no-any-return]


def _plain_norm(graph: fx.Graph, norm: fx.Node) -> fx.Node:
    """An RMSNorm in torch's own operators, as inductor knows how to fuse them with others."""
    x, weight, eps = norm.args
    aten, to = _aten, torch.ops.prims.convert_element_type.default

    def call(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        values = fx.node.map_arg(args, lambda arg: arg.meta["val"])
        with norm.meta["val"].fake_mode:
            node.meta["val"] = target(*values)
        return node

    x32, weight32 = call(to, x, torch.float32), call(to, weight, torch.float32)
    mean = call(aten.mean.dim, call(aten.mul.Tensor, x32, x32), [-1], True)
    scale = call(aten.rsqrt.default, call(aten.add.Tensor, mean, eps))
    normed = call(aten.mul.Tensor, call(aten.mul.Tensor, x32, scale), weight32)
    return call(to, normed, norm.meta["val"].dtype)


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
        arguments = (*linear.args[:3], residual, *linear.args[4:])
        fused = graph.call_function(linear.target, arguments)  # type: ignore[arg-type]
    fused.meta.update(add.meta)
    add.replace_all_uses_with(fused)
    graph.erase_node(add)
    graph.erase_node(linear)


def _probe() -> None:
    """Run the kernel, and hold it against torch's."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator).bfloat16()

    for rows, inputs, outputs in ((1, 512, 6), (3, 776, 33), (4, 64, 9000), (2, 5000, 40)):
        x_BD, weight_ND, bias_N = random(rows, inputs), random(outputs, inputs), random(outputs)
        norms = (None, random(inputs)) if inputs <= MAX_NORMED else (None,)
        for residual_BN, norm_D in itertools.product((None, random(rows, outputs)), norms):
            normed_BD = x_BD.float()
            if norm_D is not None:
                normed_BD = F.rms_norm(normed_BD, norm_D.shape, norm_D.float(), 1e-5)
            wanted = normed_BD @ weight_ND.float().t() + bias_N.float()
            wanted += 0.0 if residual_BN is None else residual_BN.float()
            found = linear_step(x_BD, weight_ND, bias_N, residual_BN, norm_D, 1e-5)
            error = float((found.float() - wanted).norm() / wanted.norm())
            if not error < PROBE_TOLERANCE:
                raise RuntimeError(f"the kernel is off by {error:.1%} of torch's result")
    _probe_chain([random(512, 512) / 16 for _ in range(8)], random(1, 512))


def _probe_chain(weights: list[Tensor], x_BD: Tensor) -> None:
    """Kernels that start early must wait for what those ahead of them write."""
    ones_D = torch.ones_like(x_BD[0])
    found, wanted = x_BD, x_BD
    for weight_ND in weights:
        found = linear_step(found, weight_ND, None, None, ones_D, 1e-5)
    for weight_ND in weights:
        normed_BD = F.rms_norm(wanted.float(), ones_D.shape, None, 1e-5)
        wanted = (normed_BD @ weight_ND.float().t()).to(x_BD.dtype)
    error = float((found.float() - wanted.float()).norm() / wanted.float().norm())
    if not error < 3 * PROBE_TOLERANCE:
        raise RuntimeError(f"a chain of kernels is off by {error:.1%} of torch's result")


LINEAR_STEP = Operation(
    "linear_step",
    [Backend(name="triton", probe=_probe, install="pip install triton")],
    home=__name__,
)
