"""The cache of `generate()`: one State a layer, made, filled and reordered by the layer's rules.

Shape suffixes: B batch, T tokens in this call, D d_model, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from workbench.layer import PLAIN, Context, State
from workbench.model import HybridLM

LEAST_CAPACITY = 256  # tokens, where nobody said how long the sequence will get


class WorkbenchCache(Cache):  # type: ignore[misc]
    """What the layers remember of the tokens so far.

    A layer's state is made for a greatest length. A sequence that outgrows it gets new states of
    twice the size, filled by running its tokens again: the layers need not know how to grow.

    Args:
        max_length: tokens a sequence will reach, prompt included; None where nobody knows.
    """

    def __init__(self, max_length: int | None = None) -> None:
        super().__init__(layers=[])
        self.capacity = max_length or 0
        self.length = 0
        self.states: list[State] = []
        self._calls: list[tuple[Tensor, Context]] = []

    def hidden(self, model: HybridLM, tokens_BT: Tensor, context: Context) -> Tensor:
        """Take in tokens: their normed activations before the head, `[B, T, D]`."""
        if self.length and context.prefix_lengths_B is not None:
            context = dataclasses.replace(context, prefix_lengths_B=None)
        self._make_room(model, tokens_BT)
        hidden_BTD = model.hidden(tokens_BT, context, self.states)
        self._remember(tokens_BT, context)
        return hidden_BTD

    def step(self, model: HybridLM, tokens_B: Tensor) -> Tensor:
        """Take in one real token a sequence: logits `[B, V]`."""
        self._make_room(model, tokens_B[:, None])
        logits_BV = model.step(tokens_B, self.states)
        self._remember(tokens_B[:, None], PLAIN)
        return logits_BV

    def _make_room(self, model: HybridLM, tokens_BT: Tensor) -> None:
        needed = self.length + tokens_BT.shape[1]
        if not self.states:
            self.capacity = self.capacity or LEAST_CAPACITY
        elif needed <= self.capacity or all(layer.kind != "attention" for layer in model.layers):
            return
        if needed > self.capacity:
            self.capacity = 2 * needed
        self.states = [
            layer.init_state(
                tokens_BT.shape[0],
                self.capacity,
                # A large model may lie on several devices.
                device=next(block.parameters()).device,
                dtype=model.embedding.weight.dtype,
            )
            for block, layer in zip(model.blocks, model.layers, strict=True)
        ]
        if self.length:
            self._merge_calls()
            with torch.no_grad():
                model.hidden(*self._calls[0], self.states)

    def _remember(self, tokens_BT: Tensor, context: Context) -> None:
        self._calls.append((tokens_BT, context))
        self.length += tokens_BT.shape[1]

    def _merge_calls(self) -> None:
        """Make one call of all, with the same outcome."""
        contexts = [context for _, context in self._calls]
        tokens_BT = torch.cat([tokens_BT for tokens_BT, _ in self._calls], dim=1)
        merged = Context(
            attention_mask_BT=self._joined("attention_mask_BT"),
            seq_idx_BT=self._joined("seq_idx_BT"),
            prefix_lengths_B=contexts[0].prefix_lengths_B,
        )
        self._calls = [(tokens_BT, merged)]

    def _joined(self, name: str) -> Tensor | None:
        parts = [getattr(context, name) for _, context in self._calls]
        given = next((part for part in parts if part is not None), None)
        if given is None:
            return None
        # What a call left open is real tokens of the document that the row is in.
        filled: list[Tensor] = []
        for (tokens_BT, _), part in zip(self._calls, parts, strict=True):
            if part is None and name == "seq_idx_BT" and filled:
                part = filled[-1][:, -1:].expand(tokens_BT.shape)
            elif part is None:
                fill = 0 if name == "seq_idx_BT" else 1
                part = torch.full_like(tokens_BT, fill, dtype=given.dtype)
            filled.append(part)
        return torch.cat(filled, dim=1)

    # transformers' side

    def select(self, indices_B: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self.states = [state.select(indices_B) for state in self.states]
        if self._calls:
            self._merge_calls()
            tokens_BT, context = self._calls[0]
            rows: dict[str, Any] = {
                field.name: value.index_select(0, indices_B)
                for field in dataclasses.fields(context)
                if (value := getattr(context, field.name)) is not None
            }
            self._calls = [(tokens_BT.index_select(0, indices_B), Context(**rows))]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._calls:
            tokens_BT = self._calls[0][0]
            rows_B = torch.arange(tokens_BT.shape[0], device=tokens_BT.device)
            self.select(rows_B.repeat_interleave(repeats))

    def reset(self) -> None:
        self.length = 0
        self.states = []
        self._calls = []

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("recurrent states cannot go back: no assisted generation")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def __len__(self) -> int:
        return len(self.states)

    @property
    def batch_size(self) -> int:
        return self._calls[0][0].shape[0] if self._calls else -1

    @property
    def is_initialized(self) -> bool:
        return bool(self.states)

    @property
    def is_croppable(self) -> bool:
        return False
