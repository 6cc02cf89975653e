"""One training run under a token budget, resumable from its checkpoint to the same losses."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from workbench.config import Range
from workbench.data import DataSource
from workbench.errors import FieldError, WorkbenchError
from workbench.files import replacing
from workbench.model import HybridLM

Progress = Callable[[dict[str, float]], None]


class DivergedError(Exception):
    """The loss became NaN or infinite; the message says at which step."""


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run left: its curve (step, tokens, seconds, loss in nats, lr) and its length.

    The loss is the cross entropy alone, without what layers add (`Context.add_loss`).
    """

    curve: list[dict[str, float]]
    steps: int
    seconds: float


def make_optimizers(model: HybridLM, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """The optimizers of a run, every parameter in exactly one of them."""
    matrices = {
        id(module.weight): module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not model.lm_head
    }
    outside = {id(module.weight): module.weight for module in (model.embedding, model.lm_head)}
    plain = [p for p in model.parameters() if id(p) not in matrices and id(p) not in outside]
    hidden = list(matrices.values()) if config.optimizer == "muon" else []
    decayed = [*outside.values(), *(matrices.values() if not hidden else ())]
    fused = model.device.type == "cuda"
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            fused=fused,
        )
    ]
    if hidden:
        optimizers.append(
            torch.optim.Muon(
                hidden,
                lr=config.lr,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers


def train(
    model: HybridLM,
    data: DataSource,
    config: TrainingConfig,
    *,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> TrainingResult:
    """Train `model` in place, to the end of the budget.

    Args:
        checkpoint: where the run saves itself, and continues from if the file is there; left in
            place at the end for the caller to delete.
        progress: called with each recorded point of the curve.

    Raises:
        DivergedError: a loss that is NaN or infinite.
        WorkbenchError: the checkpoint is of another run, or cannot be written.
    """
    run = _Run(model, data, config)
    if checkpoint is not None and checkpoint.exists():
        run.load(checkpoint)
    model.train()
    saved = time.monotonic()
    for point in run.steps():
        if point and progress is not None:
            progress(point)
        due = config.checkpoint_seconds and time.monotonic() - saved >= config.checkpoint_seconds
        if checkpoint is not None and due:
            run.save(checkpoint)
            saved = time.monotonic()
    model.eval()
    return TrainingResult(curve=run.curve, steps=run.step, seconds=run.seconds)


class _Run:
    """The state of a run between two steps."""

    def __init__(self, model: HybridLM, data: DataSource, config: TrainingConfig) -> None:
        self.model = model
        self.data = data
        self.config = config
        self.optimizers = make_optimizers(model, config)
        self.step = 0
        self.seconds = 0.0
        self.curve: list[dict[str, float]] = []

    def steps(self) -> Iterator[dict[str, float] | None]:
        """Run to the end, a step an iteration; yields the point of the curve where one is due."""
        config = self.config
        tokens = config.batch_size * config.seq_len
        while self.step < config.steps:
            started = time.perf_counter()
            lr = config.lr_at(self.step)
            loss = self._advance(lr)
            self.step += 1
            point = None
            if self.step % config.record_every == 0 or self.step == config.steps:
                value = float(loss)
                if not math.isfinite(value):
                    raise DivergedError(f"loss is {value} at step {self.step}")
                point = {"step": self.step, "tokens": self.step * tokens, "loss": value, "lr": lr}
            self.seconds += time.perf_counter() - started
            if point is not None:
                point["seconds"] = self.seconds
                self.curve.append(point)
            yield point

    def _advance(self, lr: float) -> Tensor:
        config, device = self.config, self.model.device
        batch = self.data.train_batch(self.step, config.batch_size, config.seq_len).to(device)
        half = config.precision == "bfloat16"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            added: list[Tensor] = []
            context = dataclasses.replace(batch.context, losses=added)
            loss = self.model.loss(batch.inputs_BT, batch.targets_BT, context)
        sum(added, loss).backward()  # type: ignore[no-untyped-call]
        if config.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    def _identity(self) -> dict[str, Any]:
        return {
            "layout": self.model.layout.hash,
            "training": dataclasses.asdict(self.config),
            "seed": self.data.seed,
            "data": self.data.describe(),
        }

    def save(self, path: Path) -> None:
        """Write weights, optimizer states and curve, whole or not at all."""
        tensors = {f"model.{name}": value for name, value in _tensors(self.model).items()}
        for index, optimizer in enumerate(self.optimizers):
            for key, state in optimizer.state_dict()["state"].items():
                for name, value in state.items():
                    tensors[f"optimizer.{index}.{key}.{name}"] = torch.as_tensor(value)
        tensors["rng"] = torch.get_rng_state()
        progress = {"step": self.step, "seconds": self.seconds, "curve": self.curve}
        metadata = {"run": json.dumps(self._identity()), "progress": json.dumps(progress)}
        with replacing(path) as temporary:
            # A copy each: safetensors refuses views of shared storage.
            _save({k: v.detach().clone() for k, v in tensors.items()}, temporary, metadata)

    def load(self, path: Path) -> None:
        """Continue from what `save` wrote.

        Raises:
            WorkbenchError: it is of another layout, training or seed, or damaged.
        """
        try:
            with safe_open(path, "pt", device=str(self.model.device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            progress = json.loads(metadata["progress"])
            same = json.loads(metadata["run"]) == self._identity()
        except Exception as error:
            raise WorkbenchError(f"checkpoint {path} cannot be read ({error}): delete it") from None
        if not same:
            raise WorkbenchError(f"checkpoint {path} belongs to another run: delete it")
        with torch.no_grad():
            for name, value in _tensors(self.model).items():
                value.copy_(tensors[f"model.{name}"])
        for index, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(_optimizer_state(optimizer, index, tensors))
        torch.set_rng_state(tensors["rng"].cpu())
        self.step, self.seconds = progress["step"], progress["seconds"]
        self.curve = progress["curve"]


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
    with replacing(path) as temporary:
        _save({name: value.contiguous() for name, value in state.items()}, temporary, metadata)


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
