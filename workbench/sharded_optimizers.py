"""The optimizers of a sharded model: each process updates its rows.

They work on plain tensors that lie where the DTensors' rows lie: AdamW's update is one number at a
time. Muon's needs whole matrices, which are therefore dealt out: each process orthogonalises some.

Shape suffixes: K matrices, P processes, R rows of a process (padded), M rows, N columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim._muon import _zeropower_via_newtonschulz

from workbench.model import HybridLM
from workbench.optimizers import (
    make_optimizers,
    momentum_updates,
    orthogonalize,
    rate_and_scale,
)
from workbench.sharded_model import local
from workbench.sharded_processes import Processes
from workbench.training_config import TrainingConfig


class ShardedParameters:
    """A sharded model's parameters as plain ones that share their memory.

    Attributes:
        pairs: each DTensor with the plain parameter of its rows.
    """

    @torch.no_grad()
    def __init__(self, model: HybridLM) -> None:
        self.pairs = [(p, nn.Parameter(local(p))) for p in model.parameters()]
        self._plain = {id(whole): plain for whole, plain in self.pairs}
        self._whole = {id(plain): whole for whole, plain in self.pairs}

    def plain(self, whole: Tensor) -> nn.Parameter:
        return self._plain[id(whole)]

    def whole(self, plain: Tensor) -> nn.Parameter:
        return self._whole[id(plain)]

    def optimizers(
        self, model: HybridLM, config: TrainingConfig, processes: Processes
    ) -> list[torch.optim.Optimizer]:
        """Those of `make_optimizers`, on the plain parameters."""
        made = make_optimizers(model, config)
        for optimizer in made:
            for group in optimizer.param_groups:
                group["params"] = [self.plain(parameter) for parameter in group["params"]]
        return [
            ShardedMuon(optimizer.param_groups, self, processes)
            if isinstance(optimizer, torch.optim.Muon)
            else optimizer
            for optimizer in made
        ]

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Move the gradients of a backward pass over to the plain parameters."""
        for whole, plain in self.pairs:
            plain.grad = None if whole.grad is None else local(whole.grad)
            whole.grad = None

    @torch.no_grad()
    def clip(self, limit: float) -> None:
        """Scale the gradients down to a norm of `limit`, all of all processes together."""
        parameters = [plain for _, plain in self.pairs if plain.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        squares = nn.utils.get_total_norm(gradients).square()
        dist.all_reduce(squares)
        nn.utils.clip_grads_with_norm_(parameters, limit, squares.sqrt())


class ShardedMuon(torch.optim.Muon):
    """torch's Muon on rows: the same updates as of whole matrices in one process.

    All matrices of a shape go to their owners in one exchange and come back in another, in
    bfloat16, in which they are multiplied anyway. A process owns every P-th part of them.
    """

    def __init__(
        self, groups: list[dict[str, Any]], parameters: ShardedParameters, processes: Processes
    ) -> None:
        super().__init__(groups)
        self.parameters, self.processes = parameters, processes

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if closure is not None:
            raise NotImplementedError("ShardedMuon takes no closure")
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[self.parameters.whole(parameter).shape].append(parameter)
            for shape, parameters in by_shape.items():
                self._update(parameters, shape, group)
        return None

    def _update(self, parameters: list[Tensor], shape: torch.Size, group: dict[str, Any]) -> None:
        """Update parameters of one shape."""
        updates = momentum_updates(self, parameters, group)
        directions = self._directions(updates, shape[0], group)
        lr, scale = rate_and_scale(parameters, shape, group)
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_sub_(parameters, [direction * scale for direction in directions])

    def _directions(
        self, updates: list[Tensor], num_rows: int, group: dict[str, Any]
    ) -> list[Tensor]:
        """The rows of this process of the orthogonalised matrices, in float32."""
        count, rank = self.processes.count, self.processes.rank
        each = -(-len(updates) // count)  # matrices that a process owns
        height = -(-num_rows // count)
        sent_KRN = updates[0].new_zeros(
            (count * each, height, updates[0].shape[1]), dtype=torch.bfloat16
        )
        for slot, update in enumerate(updates):
            sent_KRN[slot, : len(update)] = update
        parts_PKRN = _exchanged(sent_KRN).view(count, each, height, -1)
        whole_KMN = parts_PKRN.transpose(0, 1).flatten(1, 2)
        owned = min(max(len(updates) - rank * each, 0), each)
        if owned:
            matrices_KMN = whole_KMN[:owned, :num_rows]
            whole_KMN[:owned, :num_rows] = _orthogonalized(matrices_KMN, group)
        parts_PKRN = whole_KMN.view(each, count, height, -1).transpose(0, 1)
        back_KRN = _exchanged(parts_PKRN.flatten(0, 1).contiguous())
        return [
            back_KRN[slot, : len(update)].to(update.dtype) for slot, update in enumerate(updates)
        ]


def _exchanged(tensor: Tensor) -> Tensor:
    """The p-th part of every process, in the p-th process."""
    received = torch.empty_like(tensor)
    dist.all_to_all_single(received, tensor)
    return received


def _orthogonalized(matrices_KMN: Tensor, group: dict[str, Any]) -> Tensor:
    """As the optimizer of one process does it on this kind of device."""
    options = group["ns_coefficients"], group["ns_steps"], group["eps"]
    if matrices_KMN.is_cuda:
        return orthogonalize(matrices_KMN, *options)
    return torch.stack([_zeropower_via_newtonschulz(matrix, *options) for matrix in matrices_KMN])
