"""Energy a decoded token, read from the device's own counter: NVML on CUDA, RAPL on a CPU.

Nothing is estimated and nothing subtracted: the figure holds the device's idle draw and whatever
else ran on it meanwhile. A device without a readable counter is refused.

Shape suffixes: B batch, T tokens of the prompt, S steps.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import torch
from torch import Tensor

from workbench.errors import FieldError, WorkbenchError
from workbench.hookspecs import Register, hookimpl
from workbench.metric import Metric, Subject
from workbench.model import HybridLM

POWERCAP = Path("/sys/class/powercap")
WARMUP = 8  # steps before the first counted one


class Counter(Protocol):
    """What counts a device's energy."""

    name: str

    def joules(self) -> float:
        """Joules since some fixed moment; never falls."""


class NvmlCounter:
    """What an NVIDIA GPU has drawn since its driver was loaded, board and memory included.

    In steps of 1 mJ, renewed some 10 times a second.

    Args:
        nvml: the module `pynvml`.
        uuid: of the GPU, as NVML writes it (`GPU-…`).

    Raises:
        WorkbenchError: no such GPU, or one that does not count (before Volta, or a slice of one).
    """

    name = "nvml"

    def __init__(self, nvml: Any, uuid: str) -> None:
        self._nvml = nvml
        try:
            nvml.nvmlInit()
            self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
            self.joules()
        except nvml.NVMLError as error:
            raise WorkbenchError(
                f"this GPU's energy counter cannot be read (NVML: {error}). It takes a GPU of "
                "Volta or later, whole, not a slice of one; without it leave the metric out."
            ) from error

    def joules(self) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000


class RaplCounter:
    """What the processor packages, and their memory where it is counted apart, have drawn.

    A zone's counter starts again at 0 beyond its range (some 262 kJ: half an hour at 150 W), so
    it must be read more often than that.

    Args:
        root: the powercap folder of sysfs.

    Raises:
        WorkbenchError: there are no zones, or they cannot be read.
    """

    name = "rapl"

    def __init__(self, root: Path = POWERCAP) -> None:
        self._zones = list(_zones(root))
        if not self._zones:
            raise WorkbenchError(
                f"this CPU has no readable energy counter: no RAPL package under {root} (it takes "
                "Linux on the bare machine, Intel or AMD). Leave the metric out, or measure on a "
                "GPU that counts."
            )
        self._last = [_read(zone / "energy_uj") for zone in self._zones]
        self._range = [_read(zone / "max_energy_range_uj") for zone in self._zones]
        self._total = 0

    def joules(self) -> float:
        now = [_read(zone / "energy_uj") for zone in self._zones]
        for before, after, size in zip(self._last, now, self._range, strict=True):
            self._total += after - before if after >= before else after - before + size
        self._last = now
        return self._total / 1e6


def _zones(root: Path) -> Iterator[Path]:
    """The packages and, of each, the memory; cores are a part of their package."""
    for zone in sorted(root.glob("*-rapl:*")):
        level = zone.name.count(":")
        name = (zone / "name").read_text(encoding="utf-8").strip()
        if (level == 1 and name.startswith("package")) or (level == 2 and name == "dram"):
            yield zone


def _read(file: Path) -> int:
    try:
        return int(file.read_text(encoding="utf-8"))
    except PermissionError as error:
        raise WorkbenchError(
            f"{file} may not be read: Linux keeps energy counters to root. "
            f"`sudo chmod a+r {file.parent.parent}/*/energy_uj` allows it until the next start."
        ) from error
    except (OSError, ValueError) as error:
        raise WorkbenchError(f"the energy counter {file} cannot be read: {error}") from error


def open_counter(device: torch.device) -> Counter:
    """The counter of a device.

    Raises:
        WorkbenchError: it has none that can be read; says why and what would help.
    """
    if device.type == "cpu":
        return RaplCounter()
    if device.type != "cuda" or torch.version.hip is not None:
        raise WorkbenchError(f"no energy counter is known for {device}: use an NVIDIA GPU or a CPU")
    try:
        nvml = import_module("pynvml")
    except ImportError as error:
        raise WorkbenchError(
            "reading a GPU's energy counter takes NVML's Python binding: pip install nvidia-ml-py"
        ) from error
    # By UUID: NVML numbers all GPUs, torch those that CUDA_VISIBLE_DEVICES leaves.
    return NvmlCounter(nvml, f"GPU-{torch.cuda.get_device_properties(device).uuid}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Energy:
    """What a number of decode steps took."""

    joules: float
    seconds: float
    steps: int


class JoulesPerToken(Metric):
    """Joules of the whole device a decoded token, its idle draw included.

    A prompt of `context` random tokens fills the states; then steps run for at least `seconds`,
    sampling not included. After every `tokens` steps the filled states are restored, so that the
    context stays between `context` and `context + tokens`; the copying is in the figure, a
    fraction of a step in each `tokens`. Joules, seconds, steps and mean watts are left beside it.
    """

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        batch_size: Annotated[int, "Sequences that step together"] = 1
        context: Annotated[int, "Tokens of the prompt before the first counted step"] = 512
        tokens: Annotated[int, "Steps before the prompt's states are restored"] = 128
        seconds: Annotated[float, "Steps are counted for at least so long"] = 5.0

        def __post_init__(self) -> None:
            for name in ("batch_size", "context", "tokens"):
                if getattr(self, name) < 1:
                    raise FieldError(name, f"must be at least 1, got {getattr(self, name)}")
            if self.seconds <= 0:
                raise FieldError("seconds", f"must be above 0, got {self.seconds}")

    unit: ClassVar[str] = "J/token"
    stage = "measured"
    label = "Energy a decoded token, idle draw included"

    def measure(self, subject: Subject) -> float:
        model = subject.built
        counter = open_counter(model.device)
        used = decode_energy(model, counter, self.config)
        if used.joules <= 0:
            raise WorkbenchError(
                f"the energy counter ({counter.name}) stood still for {used.seconds:.3g} s: "
                "give metrics.joules_per_token.seconds a larger value"
            )
        subject.extras.update(
            joules=used.joules,
            seconds=used.seconds,
            steps=used.steps,
            watts=used.joules / used.seconds,
        )
        batch_size: int = self.config.batch_size
        return used.joules / (used.steps * batch_size)


def decode_energy(model: HybridLM, counter: Counter, config: JoulesPerToken.Config) -> Energy:
    """What decode steps take by a counter; leaves the model and the generators as they were."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        ids = torch.randint(model.layout.vocab_size, shape, generator=generator)
        return ids.to(model.device)

    with _inference(model):
        filled = model.init_state(config.batch_size, config.context + config.tokens)
        model.prefill(random(config.batch_size, config.context), filled)
        next_SB = random(config.tokens, config.batch_size)

        def round_of_steps(count: int) -> None:
            states = copy.deepcopy(filled)
            for tokens_B in next_SB[:count]:
                model.step(tokens_B, states)
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)

        round_of_steps(WARMUP)
        start, before = time.perf_counter(), counter.joules()
        used = Energy(joules=0.0, seconds=0.0, steps=0)
        while used.seconds < config.seconds:
            round_of_steps(config.tokens)
            used = Energy(
                joules=counter.joules() - before,
                seconds=time.perf_counter() - start,
                steps=used.steps + config.tokens,
            )
    return used


@contextmanager
def _inference(model: HybridLM) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


@hookimpl
def register_metrics(register: Register[type[Metric]]) -> None:
    register("joules_per_token", JoulesPerToken)
