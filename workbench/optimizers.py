"""The optimizers of a training run: Muon for hidden matrices, AdamW for the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from workbench.model import HybridLM
from workbench.training_config import TrainingConfig


def make_optimizers(model: HybridLM, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Every parameter in exactly one optimizer; weight decay on matrices and embeddings only.

    On a CUDA device the learning rate is a tensor there, so that a captured step can change it:
    set it with `set_lr`.
    """
    matrices = {
        id(module.weight): module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not model.lm_head
    }
    outside = {id(module.weight): module.weight for module in (model.embedding, model.lm_head)}
    plain = [p for p in model.parameters() if id(p) not in matrices and id(p) not in outside]
    by_muon = list(matrices.values()) if config.optimizer == "muon" else []
    decayed = [*outside.values(), *(matrices.values() if not by_muon else ())]
    on_cuda = model.device.type == "cuda"

    def rate() -> Any:
        return torch.tensor(config.lr, device=model.device) if on_cuda else config.lr

    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay, "lr": rate()},
                {"params": plain, "weight_decay": 0.0, "lr": rate()},
            ],
            betas=(config.beta1, config.beta2),
            fused=on_cuda,
            capturable=on_cuda,
        )
    ]
    if by_muon:
        muon = BatchedMuon if on_cuda else torch.optim.Muon
        optimizers.append(
            muon(
                by_muon,
                lr=rate(),
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers


def set_lr(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    """Set the learning rate of every group, in place where it is a tensor."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


class BatchedMuon(torch.optim.Muon):
    """torch's Muon (Jordan et al., 2024), all matrices of a shape as one batch.

    The same updates in a few launches a shape rather than many a matrix, and with a learning rate
    that is read on the device: a step can be captured in a CUDA graph.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if closure is not None:
            raise NotImplementedError("BatchedMuon takes no closure")
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group)
        return None

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update parameters of one shape."""
        directions = orthogonalize(
            torch.stack(momentum_updates(self, parameters, group)),
            group["ns_coefficients"],
            group["ns_steps"],
            group["eps"],
        ).to(parameters[0].dtype)
        lr, scale = rate_and_scale(parameters, parameters[0].shape, group)
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_sub_(parameters, list((directions * scale).unbind()))


def momentum_updates(
    optimizer: torch.optim.Optimizer, parameters: list[Tensor], group: dict[str, Any]
) -> list[Tensor]:
    """Take the gradients into Muon's momentum; what is to be orthogonalised, in their shapes."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    buffers: list[Tensor] = []
    for parameter in parameters:
        state = optimizer.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffers.append(state["momentum_buffer"])
    torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
    if not group["nesterov"]:
        return buffers
    return list(torch._foreach_lerp(gradients, buffers, group["momentum"]))


def rate_and_scale(
    parameters: list[Tensor], shape: torch.Size, group: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The learning rate on the parameters' device, and what a direction is multiplied by.

    `match_rms_adamw`: an update's root mean square becomes 0.2 of the rate, as AdamW's.

    Args:
        shape: of the whole matrices.
    """
    lr = torch.as_tensor(group["lr"], device=parameters[0].device)
    return lr, lr * (0.2 * max(shape) ** 0.5)


def orthogonalize(
    matrices_KMN: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Each matrix with singular values near 1, in bfloat16: a quintic Newton-Schulz iteration."""
    linear, cubic, quintic = coefficients
    x = matrices_KMN.bfloat16()
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(eps)
    for _ in range(steps):
        gram = x @ x.mT
        update = torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic)
        x = torch.baddbmm(x, update, x, beta=linear)
    return x.mT if is_tall else x
