"""The key-value cache: allocated once, filled in place, a ring where a sliding window bounds it.

Shape suffixes: B batch, H key-value heads, L slots, T tokens in this call, P head dim.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.layer import Context, State


@dataclasses.dataclass(kw_only=True)
class KVCache(State):
    """Keys and values of the tokens so far; token p lies in slot p modulo L. Carries no gradients.

    Attributes:
        keys_BHLP, values_BHLP: the slots, keys already turned by their position.
        max_length: tokens it may be given; None for a ring, which forgets the oldest.
        length: tokens given so far, padding included.
        visible_BL: slots that later tokens may see: no padding, and of the document that the row is
            in. None while all are, so that a plain batch holds and computes nothing more.
        document_B: `seq_idx` of the last token; None for document 0.
        position: after `make_static`, the number of tokens so far, int64 on the device; `length`
            then counts by `advance` alone.
    """

    keys_BHLP: Tensor
    values_BHLP: Tensor
    max_length: int | None
    length: int = 0
    visible_BL: Tensor | None = None
    document_B: Tensor | None = None
    position: Tensor | None = None

    @property
    def slots(self) -> int:
        """L."""
        return self.keys_BHLP.shape[2]

    @property
    def filled(self) -> int:
        """How many slots hold a token."""
        return min(self.length, self.slots)

    @property
    def room(self) -> int | None:
        return None if self.max_length is None else self.max_length - self.length

    def make_static(self) -> None:
        self.position = torch.tensor(self.length, device=self.keys_BHLP.device)

    def advance(self) -> None:
        self.length += 1

    def restore(self, before: KVCache) -> None:
        position = self.position
        super().restore(before)
        if position is not None and before.position is None:
            self.position = position.fill_(before.length)

    def reserve(self, num_tokens: int) -> None:
        """Refuse tokens that will not fit.

        Raises:
            WorkbenchError: the sequence would outgrow `max_length`.
        """
        if self.max_length is not None and self.length + num_tokens > self.max_length:
            raise WorkbenchError(
                f"attention's cache holds {self.max_length} tokens and the sequence reaches "
                f"{self.length + num_tokens}: make its state with max_length of at least that, "
                f"or give the layer a sliding_window."
            )

    def past(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and visibility of the remembered tokens, oldest first."""
        visible_BL = None if self.visible_BL is None else self._in_order(self.visible_BL, dim=1)
        return self._in_order(self.keys_BHLP), self._in_order(self.values_BHLP), visible_BL

    def remembered(self) -> tuple[Tensor, Tensor]:
        """Keys and values that a step looks at, in the order of their slots; see `seen`."""
        if self.position is not None:
            return self.keys_BHLP, self.values_BHLP
        return self.keys_BHLP[:, :, : self.filled], self.values_BHLP[:, :, : self.filled]

    def seen(self) -> Tensor | None:
        """Which of the remembered a step may see, `[B or 1, L]`; None for all."""
        if self.position is None:
            return None if self.visible_BL is None else self.visible_BL[:, : self.filled]
        slots_L = torch.arange(self.slots, device=self.keys_BHLP.device)
        filled_1L = (slots_L < self.position)[None]
        return filled_1L if self.visible_BL is None else filled_1L & self.visible_BL

    def ages(self) -> Tensor:
        """How many tokens each remembered slot lies before the last one given, `[L]`."""
        length = self.length if self.position is None else self.position
        held = self.filled if self.position is None else self.slots
        return (length - 1 - torch.arange(held, device=self.keys_BHLP.device)) % self.slots

    def extend(self, keys_BHTP: Tensor, values_BHTP: Tensor, context: Context) -> None:
        """Remember the tokens of a prefill call."""
        self._write(self.keys_BHLP, keys_BHTP)
        self._write(self.values_BHLP, values_BHTP)
        self._remember_visibility(keys_BHTP.shape[2], context)
        self.length += keys_BHTP.shape[2]

    def append(self, keys_BH1P: Tensor, values_BH1P: Tensor) -> None:
        """Remember one real token of the document that the row is in."""
        if self.position is not None:
            self._append_static(keys_BH1P, values_BH1P, self.position)
            return
        slot = self.length % self.slots
        self.keys_BHLP[:, :, slot] = keys_BH1P[:, :, 0].detach()
        self.values_BHLP[:, :, slot] = values_BH1P[:, :, 0].detach()
        if self.visible_BL is not None:
            self.visible_BL[:, slot] = True
        self.length += 1

    def _append_static(self, keys_BH1P: Tensor, values_BH1P: Tensor, position: Tensor) -> None:
        slot_1 = (position % self.slots)[None]
        self.keys_BHLP.index_copy_(2, slot_1, keys_BH1P.to(self.keys_BHLP.dtype))
        self.values_BHLP.index_copy_(2, slot_1, values_BH1P.to(self.values_BHLP.dtype))
        if self.visible_BL is not None:
            self.visible_BL.index_fill_(1, slot_1, True)
        position.add_(1)

    def _remember_visibility(self, num_tokens: int, context: Context) -> None:
        mask_BT, document_BT = context.attention_mask_BT, context.seq_idx_BT
        if mask_BT is None and document_BT is None and self.visible_BL is None:
            return
        batch_size, slots = self.keys_BHLP.shape[0], self.slots
        true = torch.ones((), dtype=torch.bool, device=self.keys_BHLP.device)
        visible_BT = true.expand(batch_size, num_tokens) if mask_BT is None else mask_BT
        if self.visible_BL is None:
            self.visible_BL = true.repeat(batch_size, slots)
        if document_BT is not None:
            last_B = document_BT[:, -1]
            before_B = torch.zeros_like(last_B) if self.document_B is None else self.document_B
            self.visible_BL &= (before_B == last_B)[:, None]
            visible_BT = visible_BT & (document_BT == last_B[:, None])
            self.document_B = last_B.clone()
        self._write(self.visible_BL, visible_BT, dim=1)

    def _write(self, cache: Tensor, new: Tensor, dim: int = 2) -> None:
        """Copy the tokens that will stay into their slots, along `dim`."""
        num_tokens = new.shape[dim]
        kept = min(num_tokens, self.slots)
        new = new.detach().narrow(dim, num_tokens - kept, kept)
        slot = (self.length + num_tokens - kept) % self.slots
        until_end = min(kept, self.slots - slot)
        cache.narrow(dim, slot, until_end).copy_(new.narrow(dim, 0, until_end))
        cache.narrow(dim, 0, kept - until_end).copy_(new.narrow(dim, until_end, kept - until_end))

    def _in_order(self, cache: Tensor, dim: int = 2) -> Tensor:
        oldest = self.length % self.slots if self.length > self.slots else 0
        if oldest == 0:
            return cache.narrow(dim, 0, self.filled)
        return torch.cat(
            (cache.narrow(dim, oldest, self.slots - oldest), cache.narrow(dim, 0, oldest)), dim=dim
        )
