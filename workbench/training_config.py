"""The `[training]` table of a study as typed data. No torch."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from workbench.config import Range
from workbench.errors import FieldError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The `[training]` table of a study.

    Muon takes the hidden matrices and AdamW everything else (embedding, head, norms, conv, A_log,
    D, dt_bias), both with the one `lr`: Muon's updates are scaled to AdamW's root mean square.
    """

    tokens: Annotated[int, Range(1, 10**12), "training tokens; every trial gets the same"]
    batch_size: Annotated[int, Range(1, 4096), "sequences a step"] = 8
    seq_len: Annotated[int, Range(1, 2**20), "tokens a sequence"] = 256
    optimizer: Annotated[Literal["muon", "adamw"], "of hidden matrices"] = "muon"
    lr: Annotated[float, Range(0.0, 10.0), "peak learning rate"] = 3e-3
    weight_decay: Annotated[float, Range(0.0, 1.0), "decoupled, on matrices only"] = 0.1
    beta1: Annotated[float, Range(0.0, 1.0), "AdamW's first moment"] = 0.9
    beta2: Annotated[float, Range(0.0, 1.0), "AdamW's second moment"] = 0.95
    warmup: Annotated[float, Range(0.0, 1.0), "share of the steps with rising lr"] = 0.05
    cooldown: Annotated[float, Range(0.0, 1.0), "share of the steps with falling lr"] = 0.5
    grad_clip: Annotated[float, Range(0.0, 1e6), "largest gradient norm; 0 does not clip"] = 1.0
    precision: Annotated[Literal["float32", "bfloat16"], "of autocast; weights stay float32"] = (
        "float32"
    )
    compile: Annotated[Literal["auto", "off"], "of the blocks; auto: on a CUDA device"] = "auto"
    cuda_graph: Annotated[Literal["auto", "off"], "replay captured steps; auto: on CUDA"] = "auto"
    checkpoint_blocks: Annotated[bool, "keep no activations inside blocks: less memory"] = False
    record_every: Annotated[int, Range(1, 10**6), "steps between points of the curve"] = 1
    checkpoint_seconds: Annotated[float, Range(0.0, 1e6), "between checkpoints; 0: none"] = 30.0

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_size", "seq_len", "record_every"):
            if getattr(self, name) < 1:
                raise FieldError(name, f"must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "weight_decay", "grad_clip", "checkpoint_seconds"):
            if getattr(self, name) < 0:
                raise FieldError(name, f"must not be negative, got {getattr(self, name)}")
        if self.lr == 0:
            raise FieldError("lr", "must be above 0")
        for name in ("warmup", "cooldown"):
            if not 0 <= getattr(self, name) <= 1:
                raise FieldError(name, f"is a share between 0 and 1, got {getattr(self, name)}")
        if self.warmup + self.cooldown > 1:
            raise FieldError("cooldown", "warmup and cooldown together exceed the whole run")
        if self.tokens < self.batch_size * self.seq_len:
            raise FieldError(
                "tokens",
                f"{self.tokens} are fewer than one step's {self.batch_size * self.seq_len}: "
                "raise tokens, or lower batch_size or seq_len",
            )

    @property
    def steps(self) -> int:
        """Optimizer steps that the token budget pays for."""
        return self.tokens // (self.batch_size * self.seq_len)

    def lr_at(self, step: int) -> float:
        """Trapezoidal schedule: linear up, flat, linear down to 0."""
        warm, cool = self.warmup * self.steps, self.cooldown * self.steps
        rising = (step + 1) / warm if step + 1 < warm else 1.0
        falling = (self.steps - step) / cool if self.steps - step < cool else 1.0
        return self.lr * min(rising, falling)
