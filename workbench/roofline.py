"""The least time that a device allows for a phase of a layout, and how near a measured one comes.

A decode step must read every weight it uses and the states of all its sequences, and do its
multiply-adds; a prefill likewise. So

    bound = max(bytes / bandwidth, FLOPs / rate)

with bytes and FLOPs counted exactly (`Builder.costs`) and both ceilings measured on the device: a
large copy and a large sum, a large matrix product of the dtype. MBU and MFU are the shares of these
ceilings that a measured time comes to. They are of what the device does, not of its data sheet.

What this bound is not: activations inside a layer, kernel launches and functions such as exp are
free in it, so it may lie far below what can be reached. And where weights and states fit into the
device's last cache (`Bound.fits_cache`; 50 MB on an H100 or H200), repeated steps need not read
them from memory at all and can beat the memory bound: an MBU above 1 is then no mistake.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.costs import DTYPE_BYTES
from workbench.errors import WorkbenchError
from workbench.files import read_json, write_json
from workbench.latency_machine import Load, Machine, Phase
from workbench.measuring import time_calls

if TYPE_CHECKING:
    from workbench.builder import BlockCosts, Builder
    from workbench.layout import Layout

SCHEMA = 1
COPIED = {"cpu": 2**27, "cuda": 2**28}  # bytes: several times the last cache
SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices
CACHE_SIZE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
_measured: dict[str, Ceilings] = {}  # by file, once a process


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What a device was seen to do at best.

    Attributes:
        machine: where; its timer plays no part.
        bandwidth: bytes a second of memory: the faster of a copy (read and write) and a sum (read).
        rate: FLOPs a second of a matrix product of the machine's dtype.
        cache_bytes: of the last cache before memory, 0 where that is not known.
    """

    machine: Machine
    bandwidth: float
    rate: float
    cache_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Ceilings:
        """
        Raises:
            WorkbenchError: of another schema, or damaged.
        """
        try:
            if data["schema"] != SCHEMA:
                raise WorkbenchError(f"schema {data['schema']!r}, and this one reads {SCHEMA}")
            return cls(
                machine=Machine.from_dict(data["machine"]),
                bandwidth=float(data["bandwidth"]),
                rate=float(data["rate"]),
                cache_bytes=int(data["cache_bytes"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise WorkbenchError(f"no measured ceilings: {error!r}") from None


def measure_ceilings(device: str, dtype: str = "float32") -> Ceilings:
    """Measure them now: a fraction of a second, and three quarters of a GB on a GPU.

    Raises:
        WorkbenchError: a device that cannot be timed.
    """
    kind = torch.device(device).type
    if kind not in COPIED:
        raise WorkbenchError(f"cannot time on {kind!r}: use {' or '.join(COPIED)}")
    with torch.inference_mode():
        bandwidth = _bandwidth(kind, device)
        rate = _rate(kind, device, dtype)
    return Ceilings(
        machine=Machine.here(device, dtype),
        bandwidth=bandwidth,
        rate=rate,
        cache_bytes=_cache_bytes(device),
    )


def _bandwidth(kind: str, device: str) -> float:
    source = torch.ones(COPIED[kind] // 4, device=device)
    target = torch.empty_like(source)
    copied = 2 * COPIED[kind] / _fastest(lambda: target.copy_(source), device)
    summed = COPIED[kind] / _fastest(source.sum, device)
    return max(copied, summed)


def _rate(kind: str, device: str, dtype: str) -> float:
    side = SIDE[kind]
    # Noise, not ones: a GPU's clock rises with operands that switch few transistors.
    dice = torch.Generator(device).manual_seed(0)
    factors = torch.randn(2, side, side, device=device, generator=dice).to(getattr(torch, dtype))
    product = torch.empty_like(factors[0])
    return 2 * side**3 / _fastest(lambda: torch.mm(*factors, out=product), device)


def _fastest(function: Callable[[], object], device: str) -> float:
    timing = time_calls(function, device=device, warmup=2, repeats=7, min_seconds=0.05)
    return timing.p10  # a ceiling: what disturbs a call only lowers what it shows


def _cache_bytes(device: str) -> int:
    if torch.device(device).type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))
    try:
        return int(CACHE_SIZE.read_text().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 0  # as documented: not known


def ceilings(device: str, dtype: str, folder: Path) -> Ceilings:
    """The device's ceilings, measured where `folder` does not hold them, and then kept there.

    Raises:
        WorkbenchError: the file there is damaged or of another machine; delete it.
    """
    machine = Machine.here(device, dtype)
    path = folder / f"ceilings-{machine.slug}.json"
    if str(path) not in _measured:
        if not path.exists():
            write_json(path, measure_ceilings(device, dtype).to_dict())
        try:
            found = Ceilings.from_dict(read_json(path))
        except WorkbenchError as error:
            raise WorkbenchError(f"{path}: {error}. Delete it to measure again.") from None
        machine.require(found.machine, str(path))
        _measured[str(path)] = found
    return _measured[str(path)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What must be moved and computed at the least."""

    bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(bytes=self.bytes + other.bytes, flops=self.flops + other.flops)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """The least time for some work on a device.

    Attributes:
        memory_seconds, compute_seconds: what moving its bytes and computing its FLOPs take.
        work: the bytes and FLOPs.
        fits_cache: everything it reads fits into the last cache, so the memory bound can be beaten.
    """

    memory_seconds: float
    compute_seconds: float
    work: Work
    fits_cache: bool

    @property
    def seconds(self) -> float:
        """The larger of the two."""
        return max(self.memory_seconds, self.compute_seconds)

    def mfu(self, seconds: float) -> float:
        """Model FLOPs utilization of a measured time: the share of the ceiling."""
        return self.compute_seconds / seconds

    def mbu(self, seconds: float) -> float:
        """Memory bandwidth utilization of a measured time; see the module for figures above 1."""
        return self.memory_seconds / seconds

    def gap(self, seconds: float) -> float:
        """How many times the bound a measured time is."""
        return seconds / self.seconds


class Roofline:
    """Bounds of layouts on one device.

    Args:
        builder: knows the layers.
        ceilings: of the device, for the dtype that the models are run in.
    """

    def __init__(self, builder: Builder, ceilings: Ceilings) -> None:
        self.builder = builder
        self.ceilings = ceilings
        self.element = DTYPE_BYTES[ceilings.machine.dtype]

    def bound(self, layout: Layout, phase: Phase, batch_size: int, length: int) -> Bound:
        """The least seconds for one prefill of `batch_size` prompts of `length` tokens, or for one
        decode step with `length` tokens of context.

        Raises:
            UnknownNameError, FieldError: as `Builder.resolve`, or a size below 1.
        """
        load = Load(phase=phase, batch_size=batch_size, length=length)
        costs = self.builder.costs(layout, length=length, bytes_per_element=self.element)
        work = outside_work(layout, load, self.element)
        for block in costs.blocks:
            work += block_work(block, load)
        return self.bound_of(work)

    def bound_of(self, work: Work) -> Bound:
        """The bound of work that was counted elsewhere."""
        return Bound(
            memory_seconds=work.bytes / self.ceilings.bandwidth,
            compute_seconds=work.flops / self.ceilings.rate,
            work=work,
            fits_cache=work.bytes <= self.ceilings.cache_bytes,
        )


def block_work(block: BlockCosts, load: Load) -> Work:
    """Of one block: its weights once, its states once a sequence (written by a prefill).

    Of a mixture of experts only what one token uses: all tokens may choose the same experts.
    """
    costs, batch = block.costs, load.batch_size
    assert costs.active_parameters is not None  # Costs fills it in
    active = costs.active_parameters / costs.parameters if costs.parameters else 1.0
    weights = block.weight_bytes * active
    if load.phase == "decode":
        states, flops = costs.decode_state_bytes, costs.decode_flops
    else:
        states, flops = costs.state_bytes, costs.forward_flops
    return Work(bytes=weights + batch * states, flops=batch * flops)


def outside_work(layout: Layout, load: Load, element: int) -> Work:
    """Of final norm and head, for the last position only; rows of the embedding are for free."""
    head = layout.vocab_size * layout.d_model
    norm = layout.d_model * (1 if layout.norm == "rmsnorm" else 2)
    return Work(bytes=float((head + norm) * element), flops=2.0 * load.batch_size * head)
