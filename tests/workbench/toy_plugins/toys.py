"""Toy things and planted faults for tests of the study: cheap, and independent of the built-ins."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn

from workbench import (
    Batch,
    Choice,
    Costs,
    DataSource,
    Layer,
    Metric,
    Mixer,
    Placement,
    Range,
    State,
    WorkbenchError,
    hookimpl,
)


@dataclass
class MeanState(State):
    total_BD: torch.Tensor
    count: int = 0


class Toy(Layer):
    """Running mean of a projection: the least that a mixer can be."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        width: Annotated[int, Choice(1, 2, 3, 4), "inner width in d_model"] = 1
        gain: Annotated[float, Range(0.5, 2.0)] = 1.0

    glyph = "t"
    reference = "tests"
    output_projection = "out"

    def __init__(self, d_model, config, **factory):
        super().__init__(d_model, config, **factory)
        self.proj = nn.Linear(d_model, config.width * d_model, bias=False, **factory)
        self.out = nn.Linear(config.width * d_model, d_model, bias=False, **factory)

    @classmethod
    def costs(cls, d_model, config, *, length, bytes_per_element=4):
        weights = 2 * config.width * d_model**2
        return Costs(
            parameters=weights,
            forward_flops=2 * weights * length,
            decode_flops=2 * weights,
            state_bytes=config.width * d_model * 4,
            decode_state_bytes=2 * config.width * d_model * 4,
        )

    def init_state(self, batch_size, max_length, *, device=None, dtype=None):
        width = self.config.width * self.d_model
        return MeanState(torch.zeros(batch_size, width, device=device))

    def forward(self, x_BTD, context=None, state=None):
        y = self.proj(x_BTD) * self.config.gain
        count = torch.arange(1, y.shape[1] + 1, device=y.device)
        total = y.cumsum(1)
        if state is not None:
            total = total + state.total_BD[:, None]
            count = count + state.count
            state.total_BD, state.count = total[:, -1], state.count + y.shape[1]
        return self.out(torch.relu(total / count[:, None]))


class Other(Toy):
    glyph = "o"


class FullState(Toy):
    glyph = "f"
    kind = "attention"


class Diverges(Toy):
    glyph = "n"

    def forward(self, x_BTD, context=None, state=None):
        return super().forward(x_BTD, context, state) * (float("nan") if self.training else 1.0)


class Raises(Toy):
    glyph = "r"

    def forward(self, x_BTD, context=None, state=None):
        raise ValueError("planted fault")


class Starves(Toy):
    glyph = "s"

    def forward(self, x_BTD, context=None, state=None):
        torch.empty(2**50)
        return x_BTD


class Dies(Toy):
    """Kills its own process while training."""

    glyph = "k"

    def forward(self, x_BTD, context=None, state=None):
        if self.training:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x_BTD, context, state)


class Hangs(Toy):
    glyph = "h"

    def forward(self, x_BTD, context=None, state=None):
        if self.training:
            time.sleep(600)
        return super().forward(x_BTD, context, state)


class Prints(Toy):
    glyph = "p"

    def forward(self, x_BTD, context=None, state=None):
        print("a plugin that prints")
        return super().forward(x_BTD, context, state)


class Slow(Toy):
    glyph = "w"

    def forward(self, x_BTD, context=None, state=None):
        if self.training:
            time.sleep(0.05)
        return super().forward(x_BTD, context, state)


class Alternate(Placement):
    @dataclass(frozen=True, kw_only=True)
    class Config:
        first: Annotated[str, Mixer()]
        second: Annotated[str, Mixer()]

    @classmethod
    def place(cls, num_layers, mixers, config):
        return tuple((config.first, config.second)[i % 2] for i in range(num_layers))


class Counting(DataSource):
    """Tokens that count upwards, with noise: learnable in a few steps."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        vocab_size: int = 16

    @property
    def vocab_size(self):
        return self.config.vocab_size

    def _batch(self, key, batch_size, length):
        generator = torch.Generator().manual_seed(key)
        start = torch.randint(self.vocab_size, (batch_size, 1), generator=generator)
        tokens = (start + torch.arange(length + 1)) % self.vocab_size
        noise = torch.randint(self.vocab_size, tokens.shape, generator=generator)
        keep = torch.rand(tokens.shape, generator=generator) < 0.9
        tokens = torch.where(keep, tokens, noise)
        return Batch(
            inputs_BT=tokens[:, :-1], targets_BT=tokens[:, 1:], num_bytes=batch_size * length
        )

    def train_batch(self, step, batch_size, length):
        return self._batch(1_000_003 * (self.seed + 1) + step, batch_size, length)

    def validation_batches(self, batch_size, length):
        for index in range(2):
            yield self._batch(7 + index, batch_size, length)

    def describe(self):
        return {"vocab_size": self.vocab_size}


class Loss(Metric):
    unit = "bits/byte"
    stage = "quantized"
    at_rungs = True
    label = "bits per byte of the counting task"

    def measure(self, subject):
        return subject.evaluation.bits_per_byte


class Weights(Metric):
    unit = "parameters"
    stage = "static"

    def measure(self, subject):
        return subject.costs(16).parameters


class Depth(Metric):
    unit = "layers"
    stage = "measured"

    def measure(self, subject):
        subject.extras["blocks"] = len(subject.built.blocks)
        return len(subject.built.blocks)


class Absent(Metric):
    stage = "measured"

    def measure(self, subject):
        raise WorkbenchError("this device has no such counter")


LAYERS = {
    "toy": Toy, "other": Other, "full": FullState, "diverges": Diverges, "raises": Raises,
    "starves": Starves, "dies": Dies, "hangs": Hangs, "prints": Prints, "slow": Slow,
}  # fmt: skip


@hookimpl
def register_layers(register):
    for name, layer in LAYERS.items():
        register(name, layer)


@hookimpl
def register_placements(register):
    register("alternate", Alternate)


@hookimpl
def register_data_sources(register):
    register("counting", Counting)


@hookimpl
def register_metrics(register):
    register("toy_loss", Loss)
    register("toy_weights", Weights)
    register("toy_depth", Depth)
    register("toy_absent", Absent)
