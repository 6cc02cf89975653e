"""BitLinear-Mamba: Mamba whose projections are BitLinears (b1.58, arXiv:2402.17764).

in_proj and out_proj are ternary, x_proj (B, C and the step sizes' low rank) and dt_proj if asked
for; the convolution, A and D stay as they are. b1.58 norms its input immediately before it
quantizes: in_proj relies on the residual block's norm, and out_proj gets one of its own, after
the gate. x_proj and dt_proj take their inputs unnormed, as in Mamba: the quantizer's scale a token
follows any magnitude, while the selection depends on it (`dt_bc_norm` norms it on purpose).
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from workbench.config import Choice
from workbench.costs import Costs
from workbench.errors import FieldError
from workbench_mamba.bitlinear import BitLinear
from workbench_mamba.common import upcast
from workbench_mamba.mamba import Mamba, MambaConfig
from workbench_mamba.norms import RMSNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitLinearMambaConfig(MambaConfig):
    """Mamba's hyper-parameters, which projections are ternary, and the activations' bits."""

    bit_x_proj: Annotated[bool, Choice(False, True), "Ternary x_proj (B, C, low rank of dt)"] = (
        False
    )
    bit_dt_proj: Annotated[bool, Choice(False, True), "Ternary dt_proj (step sizes)"] = False
    act_bits: Annotated[int, "Bits of the ternary projections' inputs, 2 to 8"] = 8

    @property
    def ternary(self) -> tuple[str, ...]:
        """Names of the projections that are BitLinears."""
        optional = {"x_proj": self.bit_x_proj, "dt_proj": self.bit_dt_proj}
        return (
            "in_proj",
            *(name for name, is_ternary in optional.items() if is_ternary),
            "out_proj",
        )


class BitLinearMamba(Mamba):
    """Mamba with ternary projections; padding, documents and states are as in `Mamba`.

    The training form quantizes in every forward pass and stores full precision; a b1.58
    quantizer packs the ternaries.
    """

    Config: ClassVar[type] = BitLinearMambaConfig
    glyph = "B"
    reference = "arXiv:2312.00752 with the BitLinear of arXiv:2402.17764"

    def __init__(
        self,
        d_model: int,
        config: BitLinearMambaConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, config, device=device, dtype=dtype)
        inner = config.d_inner(d_model)
        self.norm = RMSNorm(inner, eps=config.norm_eps, device=device, dtype=dtype)
        # The class names every small projection; those that are ternary here may be packed.
        self.keep_precision = {  # type: ignore[misc]
            name: why for name, why in Mamba.keep_precision.items() if name not in config.ternary
        }

    def _linear(self, name: str, *arguments: Any) -> nn.Linear:
        if name in self.config.ternary:
            return BitLinear(*arguments, act_bits=self.config.act_bits)
        return super()._linear(name, *arguments)

    @classmethod
    def check(cls, d_model: int, config: MambaConfig) -> None:
        super().check(d_model, config)
        assert isinstance(config, BitLinearMambaConfig)
        if not 2 <= config.act_bits <= 8:
            raise FieldError("act_bits", f"must be from 2 to 8, got {config.act_bits}")

    @classmethod
    def costs(
        cls, d_model: int, config: MambaConfig, *, length: int, bytes_per_element: int = 4
    ) -> Costs:
        """Mamba's, with the parameters of the norm; quantizing on the fly is not counted."""
        costs = super().costs(d_model, config, length=length, bytes_per_element=bytes_per_element)
        return costs + Costs(parameters=config.d_inner(d_model))

    def _dt(self, dt: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.config.bit_dt_proj:
            return self.dt_proj(upcast(dt)), None
        return super()._dt(dt)

    def _output(self, y: Tensor, z: Tensor) -> Tensor:
        return self.out_proj(self.norm(y, z))  # type: ignore[no-any-return]
