"""What a latency was measured on, and under which load: figures of others are never mixed in."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from typing import Any, Literal

import torch

from workbench.environment import device_name, package_versions
from workbench.errors import FieldError, WorkbenchError
from workbench.kernels import TORCH, operations
from workbench.layout import canonical_json
from workbench.measuring import EAGER

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
PACKAGES = ("lm-workbench", "torch", "triton", "mamba-ssm", "causal-conv1d", "flash-attn")


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Load:
    """What a model is asked to do.

    Attributes:
        phase: `"prefill"` of a whole prompt, or one `"decode"` step.
        batch_size: sequences together.
        length: tokens of the prompt, or of the context before the step.
    """

    phase: Phase
    batch_size: int = 1
    length: int = 512

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise FieldError("phase", f"must be 'prefill' or 'decode', got {self.phase!r}")
        for name in ("batch_size", "length"):
            if getattr(self, name) < 1:
                raise FieldError(name, f"must be at least 1, got {getattr(self, name)}")

    def __str__(self) -> str:
        return f"{self.phase}, batch {self.batch_size}, length {self.length}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What all figures of one table share.

    Attributes:
        device_name: the product's name.
        dtype: of weights, activations and caches.
        timer: how steps were run (`"eager"`, or a Stepper's name).
        threads: of the CPU; None on another device.
        versions: of packages whose kernels run; None for what is not installed.
        settings: what else decides which kernels run, such as the backends of each operation that
            does not run on torch alone.
    """

    device_name: str
    dtype: str
    timer: str
    threads: int | None
    versions: dict[str, str | None]
    settings: dict[str, str]

    @classmethod
    def here(
        cls, device: str, dtype: str = "float32", timer: str = EAGER, threads: int | None = None
    ) -> Machine:
        """This process's machine.

        Args:
            threads: of a CPU; those that torch has now if None.
        """
        on_cpu = torch.device(device).type == "cpu"
        backends = {
            name: ",".join(order)
            for name, operation in sorted(operations().items())
            if not on_cpu and (order := operation.order()) != (TORCH,)
        }
        return cls(
            device_name=device_name(device),
            dtype=dtype,
            timer=timer,
            threads=(threads or torch.get_num_threads()) if on_cpu else None,
            versions={**package_versions(PACKAGES), "cuda": torch.version.cuda},
            settings={"float32_matmul": torch.get_float32_matmul_precision(), **backends},
        )

    @property
    def slug(self) -> str:
        """A file's name for its figures: equal for equal machines."""
        name = re.sub(r"[^A-Za-z0-9]+", "-", self.device_name).strip("-").lower()
        digest = hashlib.sha256(canonical_json(dataclasses.asdict(self)).encode()).hexdigest()
        return f"{name}-{self.dtype}-{self.timer}-{digest[:8]}"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Machine:
        return cls(**{field.name: data[field.name] for field in dataclasses.fields(cls)})

    def require(self, other: Machine, what: str) -> None:
        """Refuse figures of another machine.

        Args:
            other: where they were measured.
            what: names them, as the beginning of a sentence.

        Raises:
            WorkbenchError: lists every difference.
        """
        changes = [
            f"{name}: {there!r} there, {here!r} here"
            for name, here, there in _pairs(self.to_dict(), other.to_dict())
            if here != there
        ]
        if changes:
            raise WorkbenchError(
                f"{what} was measured elsewhere or otherwise: {'; '.join(changes)}. Measure it "
                "here: workbench latency STUDY.toml"
            )


def _pairs(here: dict[str, Any], there: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Name and both values of every fact, those of inner tables one by one."""
    pairs = []
    for name in dict.fromkeys([*here, *there]):
        mine, others = here.get(name), there.get(name)
        if isinstance(mine, dict) and isinstance(others, dict):
            pairs += [(f"{name}.{inner}", a, b) for inner, a, b in _pairs(mine, others)]
        else:
            pairs.append((name, mine, others))
    return pairs
