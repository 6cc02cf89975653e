"""One training run under a token budget, resumable from its checkpoint to the same losses."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from workbench.batches import upcoming_batches
from workbench.compilation import prepared_seconds
from workbench.data import DataSource
from workbench.errors import WorkbenchError
from workbench.files import replacing
from workbench.model import HybridLM
from workbench.optimizers import make_optimizers
from workbench.train_step import StepOptions, TrainStep
from workbench.training_config import TrainingConfig

__all__ = [
    "CheckpointError",
    "DivergedError",
    "TrainingConfig",
    "TrainingResult",
    "TrainingRun",
    "load_weights",
    "make_optimizers",
    "save_state",
    "save_weights",
    "train",
]

Progress = Callable[[dict[str, float]], None]

# What a checkpoint holds of a run beside tensors: how far it is.
PROGRESS = ("step", "seconds", "preparing_seconds", "curve")


class CheckpointError(WorkbenchError):
    """A file that is no whole checkpoint: it was cut off, say. To go on, delete it."""


class DivergedError(Exception):
    """The loss became NaN or infinite; the message says at which step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run left: its curve (step, tokens, seconds, loss in nats, lr) and its length.

    The loss is the cross entropy alone, without what layers add (`Context.add_loss`). `mode` and
    `note` say how the last step ran (`TrainStep`). `seconds`, here and in the curve, are without
    `preparing_seconds`: the first steps of a process and the capture, where blocks are compiled or
    steps captured (`compilation.preparing`).
    """

    curve: list[dict[str, float]]
    steps: int
    seconds: float
    preparing_seconds: float
    mode: str
    note: str


def train(
    model: HybridLM,
    data: DataSource,
    config: TrainingConfig,
    *,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    stop: int | None = None,
) -> TrainingResult:
    """Train `model` in place, to the end of the budget or to a stop on the way.

    A run that was stopped goes on from its checkpoint as if it had not been.

    Args:
        checkpoint: where the run saves itself, and continues from if the file is there; left in
            place at the end for the caller to delete.
        progress: called with each recorded point of the curve.
        stop: the number of steps after which the run saves itself and stops; None for the end.

    Raises:
        DivergedError: a loss that is NaN or infinite.
        CheckpointError: the checkpoint is damaged.
        WorkbenchError: it is of another run, past the stop, or cannot be written.
    """
    return TrainingRun(model, data, config).complete(checkpoint, progress, stop)


class TrainingRun:
    """The state of a run between two steps; `sharded_training` spreads one over processes."""

    def __init__(self, model: HybridLM, data: DataSource, config: TrainingConfig) -> None:
        self.model = model
        self.data = data
        self.config = config
        self.optimizers = self._make_optimizers()
        on_cuda = model.device.type == "cuda"
        options = StepOptions(
            half=config.precision == "bfloat16",
            grad_clip=config.grad_clip,
            compiled=on_cuda and config.compile == "auto",
            captured=on_cuda and config.cuda_graph == "auto",
            checkpointed=config.checkpoint_blocks,
        )
        self.train_step = self._make_step(options)
        self.step = 0
        self.seconds = self.preparing_seconds = 0.0
        self.curve: list[dict[str, float]] = []

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        return make_optimizers(self.model, self.config)

    def _make_step(self, options: StepOptions) -> TrainStep:
        return TrainStep(self.model, self.optimizers, options)

    def _agreed(self, choice: bool) -> bool:
        """What all processes of the run do; this one would do `choice`."""
        return choice

    def complete(
        self, checkpoint: Path | None, progress: Progress | None, stop: int | None
    ) -> TrainingResult:
        """What `train` does."""
        config = self.config
        if checkpoint is not None and self._agreed(checkpoint.exists()):
            self.load(checkpoint)
        if stop is not None and self.step > stop:
            raise WorkbenchError(f"checkpoint {checkpoint} is past step {stop}: delete it")
        self.model.train()
        saved = time.monotonic()
        for point in self.steps(config.steps if stop is None else stop):
            if point and progress is not None:
                progress(point)
            if checkpoint is None or not config.checkpoint_seconds:
                continue
            if self._agreed(time.monotonic() - saved >= config.checkpoint_seconds):
                self.save(checkpoint)
                saved = time.monotonic()
        if checkpoint is not None and stop is not None:
            self.save(checkpoint)
        self.model.eval()
        return TrainingResult(
            curve=self.curve,
            steps=self.step,
            seconds=self.seconds,
            preparing_seconds=self.preparing_seconds,
            mode=self.train_step.mode,
            note=self.train_step.note,
        )

    def steps(self, end: int) -> Iterator[dict[str, float] | None]:
        """Run up to step `end`, a step an iteration; yields the point of the curve where one is."""
        config, device = self.config, self.model.device
        tokens = config.batch_size * config.seq_len
        on_cuda = device.type == "cuda"
        batches = upcoming_batches(self.data, config, self.step, end=end, pin=on_cuda)
        with self.train_step.running(), contextlib.closing(batches):
            started = time.perf_counter()  # making batches counts, or waiting for them
            for batch in batches:
                lr = config.lr_at(self.step)
                prepared = prepared_seconds()
                loss = self.train_step(batch, lr)
                prepared = prepared_seconds() - prepared
                self.step += 1
                point = None
                if self.step % config.record_every == 0 or self.step == config.steps:
                    value = float(loss)
                    if not math.isfinite(value):
                        raise DivergedError(f"loss is {value} at step {self.step}")
                    done = {"step": self.step, "tokens": self.step * tokens}
                    point = {**done, "loss": value, "lr": lr}
                self.seconds += time.perf_counter() - started - prepared
                self.preparing_seconds += prepared
                if point is not None:
                    point["seconds"] = self.seconds
                    self.curve.append(point)
                yield point
                started = time.perf_counter()

    def _identity(self) -> dict[str, Any]:
        return {
            "layout": self.model.layout.hash,
            "training": dataclasses.asdict(self.config),
            "seed": self.data.seed,
            "data": self.data.describe(),
        }

    def save(self, path: Path) -> None:
        """Write weights, optimizer states and curve, whole or not at all."""
        # A copy each: safetensors refuses views of shared storage.
        self._write(path, {k: v.detach().clone() for k, v in self._state().items()})

    def _state(self) -> dict[str, Tensor]:
        """The run's tensors, the ones that it works on."""
        tensors = {f"model.{name}": value for name, value in _tensors(self.model).items()}
        for index, optimizer in enumerate(self.optimizers):
            for key, state in optimizer.state_dict()["state"].items():
                for name, value in state.items():
                    tensors[f"optimizer.{index}.{key}.{name}"] = torch.as_tensor(value)
        tensors["rng"] = torch.get_rng_state()
        if self.model.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.model.device)
        return tensors

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        progress = {name: getattr(self, name) for name in PROGRESS}
        metadata = {"run": json.dumps(self._identity()), "progress": json.dumps(progress)}
        with replacing(path) as temporary:
            _save(tensors, temporary, metadata)

    def load(self, path: Path) -> None:
        """Continue from what `save` wrote.

        Raises:
            CheckpointError: it is damaged.
            WorkbenchError: it is of another layout, training or seed.
        """
        self._restore(*self._read(path, str(self.model.device)))

    def _read(self, path: Path, device: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors of a checkpoint, and how far it is."""
        try:
            with safe_open(path, "pt", device=device) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            progress = json.loads(metadata["progress"])
            same = json.loads(metadata["run"]) == self._identity()
        except (SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"checkpoint {path} is damaged ({error}): delete it") from None
        except OSError as error:  # which may pass
            raise WorkbenchError(f"checkpoint {path} cannot be read: {error}") from None
        if not same:
            raise WorkbenchError(f"checkpoint {path} belongs to another run: delete it")
        wanted = {f"model.{name}": value.shape for name, value in _tensors(self.model).items()}
        found = {name: value.shape for name, value in tensors.items() if name in wanted}
        knows = all(name in progress for name in PROGRESS)
        if found != wanted or "rng" not in tensors or not knows:
            raise CheckpointError(f"checkpoint {path} is damaged (it lacks a part): delete it")
        return tensors, progress

    def _restore(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, value in _tensors(self.model).items():
                value.copy_(tensors[f"model.{name}"])
        for index, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(_optimizer_state(optimizer, index, tensors))
        torch.set_rng_state(tensors["rng"].cpu())
        if "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"].cpu(), self.model.device)
        for name in PROGRESS:
            setattr(self, name, progress[name])


def _tensors(model: HybridLM) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _optimizer_state(
    optimizer: torch.optim.Optimizer, index: int, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    prefix = f"optimizer.{index}."
    for name, value in tensors.items():
        if name.startswith(prefix):
            key, field = name.removeprefix(prefix).split(".", 1)
            state.setdefault(int(key), {})[field] = value
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def save_weights(model: HybridLM, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a model's parameters and buffers as safetensors; tied weights once."""
    state = model.state_dict()
    for name in model.tied.keys() & state.keys():
        del state[name]
    save_state({name: value.contiguous() for name, value in state.items()}, path, metadata)


def save_state(
    state: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as safetensors, whole or not at all."""
    with replacing(path) as temporary:
        _save(state, temporary, metadata)


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        # Tensors made here always serialize: what fails is the writing.
        raise OSError(str(error)) from error


def load_weights(model: HybridLM, path: Path) -> None:
    """Fill a model with what `save_weights` wrote.

    Raises:
        WorkbenchError: the file is damaged or holds another model's weights; says which differ.
    """
    from safetensors.torch import load_file

    try:
        state = load_file(path, device=str(model.device))
    except Exception as error:
        raise WorkbenchError(f"cannot read the weights {path}: {error}") from None
    for name, key in model.tied.items():
        if key in state:
            state[name] = state[key]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise WorkbenchError(f"{path} does not fit the layout: {error}") from None
