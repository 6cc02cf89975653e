"""The RMSNorm inside Mamba layers: optionally gated (Mamba-2), optionally over groups.

Zhang and Sennrich, arXiv:1910.07467; the gate comes before the norm, as in arXiv:2405.21060.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench_mamba.common import upcast


class RMSNorm(nn.Module):
    """`rmsnorm(y * silu(z)) * weight`; without a `z`, `rmsnorm(y) * weight`.

    Unlike torch's, it takes weights of another dtype than its input, as mixed precision gives it.

    Args:
        channels: of the last dimension.
        groups: equal parts of the channels that each have a mean square of their own.
        eps: added to the mean square.
    """

    def __init__(
        self,
        channels: int,
        *,
        groups: int = 1,
        eps: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, y: Tensor, z: Tensor | None = None) -> Tensor:
        """`[..., channels]`; gate and mean square are computed at least in float32."""
        gated = upcast(y) if z is None else upcast(y) * F.silu(upcast(z))
        grouped = torch.unflatten(gated, -1, (self.groups, -1))
        normed = F.rms_norm(grouped, grouped.shape[-1:], eps=self.eps).flatten(-2)
        return normed.to(y.dtype) * self.weight

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, groups={self.groups}, eps={self.eps}"
