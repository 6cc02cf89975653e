"""The smallest honest layer, MLP and data source: subjects for tests of metrics, quantizers, tools.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pluggy
import torch
from torch import Tensor

from workbench.builder import Builder
from workbench.config import NoConfig
from workbench.data import Batch, DataSource
from workbench.discovery import Plugins, Provenance
from workbench.layout import Block, Layout
from workbench.testing.toy_layers import ToyMixer, ToyMLP, ToyState

__all__ = ["ToyMLP", "ToyMixer", "ToyState", "ToyText", "toy_builder", "toy_layout"]


class ToyText(DataSource):
    """Made-up sentences as bytes: even ones to train on, odd ones to judge by."""

    WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child")
    SENTENCES = 120

    def __init__(self, config: NoConfig, *, seed: int = 0, cache_dir: Path) -> None:
        super().__init__(config, seed=seed, cache_dir=cache_dir)
        dice = random.Random(0)
        lines = [
            f"{number}: {' '.join(dice.choices(self.WORDS, k=8))}.\n".encode()
            for number in range(self.SENTENCES)
        ]
        self.parts = {
            "train": torch.tensor(list(b"".join(lines[0::2]))),
            "validation": torch.tensor(list(b"".join(lines[1::2]))),
        }

    @property
    def vocab_size(self) -> int:
        return 256

    def train_batch(self, step: int, batch_size: int, length: int) -> Batch:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        tokens = self.parts["train"]
        starts_B1 = torch.randint(len(tokens) - length, (batch_size, 1), generator=generator)
        return _batch(tokens[starts_B1 + torch.arange(length + 1)])

    def validation_batches(self, batch_size: int, length: int) -> Iterator[Batch]:
        tokens = self.parts["validation"]
        rows = (len(tokens) - 1) // length
        for first in range(0, rows, batch_size):
            starts_B1 = torch.arange(first, min(first + batch_size, rows))[:, None] * length
            yield _batch(tokens[starts_B1 + torch.arange(length + 1)])

    def describe(self) -> dict[str, Any]:
        return {f"{part}_bytes": len(tokens) for part, tokens in self.parts.items()}

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


def _batch(tokens_BT: Tensor) -> Batch:
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    return Batch(inputs_BT=inputs_BT, targets_BT=targets_BT, num_bytes=float(targets_BT.numel()))


def toy_builder() -> Builder:
    """A builder that knows the toys and nothing else, whatever is installed."""
    builder = Builder(Plugins(pluggy.PluginManager("workbench"), {}, {}, ()))
    here = Provenance(
        plugin="toys", package="lm-workbench", version="", module=__name__, file=__file__
    )
    builder.layers.add("toy-mixer", ToyMixer, here)
    builder.layers.add("toy-mlp", ToyMLP, here)
    builder.data_sources.add("toy-text", ToyText, here)
    return builder


def toy_layout() -> Layout:
    """`t.t.` at d_model 32 over bytes."""
    blocks = (Block(layer="toy-mixer"), Block(layer="toy-mlp"))
    return Layout(d_model=32, vocab_size=256, blocks=blocks * 2)
