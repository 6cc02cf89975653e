"""The Layer contract: what every mixer and MLP is, whoever wrote it.

Shape suffixes: B batch, T tokens in this call, D d_model.

A layer is an `nn.Module` from `[batch, length, d_model]` to the same shape. It owes:

- `forward(x_BTD, context)`: a whole sequence, differentiable, causal.
- `forward(x_BTD, context, state)`: the same, continuing from `state` and updating it in place
  (prefill; a prompt may come in several calls).
- `step(x_BD, state, context)`: one token a sequence, equal to the forward at that position.
- `init_state(...)`: an empty state for a batch.
- `costs(d_model, config, length=...)`: exact, without building anything.
- `reset_parameters()`: its published initialisation; the constructor only allocates, so that a
  layer can be built on the meta device.

A layer may build on an earlier block (`source`): take weights from it (`shared`), or read what it
publishes in the same call (`Context.publish`, `Context.source`).

`workbench.testing.LayerContract` checks all of it on any layer.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from workbench.config import NoConfig
from workbench.costs import Costs
from workbench.layout import Block

Kind = Literal["attention", "recurrent", "mlp"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """All that a layer may know of the batch besides its activations. None means 'all plain'.

    Attributes:
        attention_mask_BT: bool, False where a token is padding. Padding must influence no other
            token; outputs at padding are unspecified (but finite).
        seq_idx_BT: int32, non-decreasing along T: the document of each token in a packed row.
            Nothing may pass from one document to another.
        prefix_lengths_B: int, how many first tokens of each row attention sees in both
            directions (prefix-LM); only for calls that start at the row's first token.
        embedding_BTD: the model's embedding of these tokens, for layers that look back at it.
        source: what the block that this one reads has published in this call.
        published: where this block publishes; None unless a later block reads it.
        losses: where auxiliary losses go; None outside training.

    A call that continues a state must begin in the document that the state belongs to.
    """

    attention_mask_BT: Tensor | None = None
    seq_idx_BT: Tensor | None = None
    prefix_lengths_B: Tensor | None = None
    embedding_BTD: Tensor | None = None
    source: Mapping[str, Tensor | None] | None = None
    published: dict[str, Tensor | None] | None = None
    losses: list[Tensor] | None = None

    def publish(self, **tensors: Tensor | None) -> None:
        """Let later blocks that read this one have tensors of this call; say in the layer's docs
        which, with shapes."""
        if self.published is not None:
            self.published.update(tensors)

    def add_loss(self, loss: Tensor) -> None:
        """Add a scalar, already weighted, to the loss that is minimised (routers' balance)."""
        if self.losses is not None:
            self.losses.append(loss)

    def mask_padding(self, x_BTD: Tensor) -> Tensor:
        """`x_BTD` with zeros at padding: what recurrent layers must take in."""
        if self.attention_mask_BT is None:
            return x_BTD
        return x_BTD * self.attention_mask_BT[..., None].to(x_BTD.dtype)


PLAIN = Context()


@dataclasses.dataclass
class State:
    """What a layer carries from token to token; subclasses add tensors whose dim 0 is the batch.

    A layer made of layers nests their states. The base class itself is the state of a layer that
    carries nothing.
    """

    def tensors(self) -> dict[str, Tensor]:
        """The state's tensors by field name, those of a nested state as `field.name`."""
        tensors: dict[str, Tensor] = {}
        for field, value in self._values().items():
            if isinstance(value, State):
                tensors |= {f"{field}.{name}": inner for name, inner in value.tensors().items()}
            elif isinstance(value, Tensor):
                tensors[field] = value
        return tensors

    @property
    def num_bytes(self) -> int:
        """Bytes held, all sequences of the batch together."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def select(self, indices_B: Tensor) -> Self:
        """A state of the given rows, copied (beam search reorders with it)."""
        rows: dict[str, Any] = {}
        for field, value in self._values().items():
            if isinstance(value, State):
                rows[field] = value.select(indices_B)
            elif isinstance(value, Tensor):
                rows[field] = value.index_select(0, indices_B)
        return dataclasses.replace(self, **rows)

    def make_static(self) -> None:
        """Take the form whose steps a CUDA graph can replay: what a step changes is tensors alone.

        A graph runs no Python: a counter kept as a number would stand still. A state with such a
        counter overrides this, and from here on counts in a tensor, updated in place.

        Raises:
            NotImplementedError: a field is a number, and the class does not say how it is counted.
        """
        for name, value in self._values().items():
            if isinstance(value, State):
                value.make_static()
            elif isinstance(value, int | float) and not isinstance(value, bool):
                kind = type(self).__name__
                raise NotImplementedError(f"{kind} keeps {name!r} on the host")

    @property
    def room(self) -> int | None:
        """Tokens that it can still take; None for no limit."""
        rooms = [value.room for value in self._values().values() if isinstance(value, State)]
        return min((room for room in rooms if room is not None), default=None)

    def advance(self) -> None:
        """Count a step that a graph has replayed, for `room`: what the host must know of it."""
        for value in self._values().values():
            if isinstance(value, State):
                value.advance()

    def restore(self, before: Self) -> None:
        """Become equal to `before`, an earlier copy: tensors in place, so that a graph sees it."""
        for name, then in before._values().items():
            now = getattr(self, name)
            if isinstance(then, State):
                now.restore(then)
            elif isinstance(then, Tensor) and isinstance(now, Tensor) and now.shape == then.shape:
                now.copy_(then)
            else:
                setattr(self, name, copy.deepcopy(then))

    def _values(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


class Layer(nn.Module):
    """Base class of every layer type; see the module's docstring for the contract.

    Class attributes to set:
        Config: a frozen, keyword-only dataclass with a search range on each field worth searching.
        kind: `"attention"` (state grows with the context), `"recurrent"` (bounded state) or
            `"mlp"` (no mixing along the sequence).
        glyph: one character for layout patterns.
        reference: the paper or implementation it follows.
        keep_precision: linear submodules that quantizers must leave alone, name → why.
        output_projection: name of the linear that writes to the residual stream; its initial
            weights are scaled down with depth. None for no such linear.
        host_synchronized: whether a forward pass waits for the device (reads a tensor's value in
            Python). Such a step cannot be captured as a CUDA graph, and is not.
        pre_norm: whether its block norms the input. False gives the layer the bare residual
            stream, and the block no norm.
        shared: children whose modules a block takes from its `source`, which must then be of the
            same type with the same Config; the others (adapters) stay its own. They are then
            children of the source alone.
    """

    Config: ClassVar[type] = NoConfig
    kind: ClassVar[Kind] = "recurrent"
    glyph: ClassVar[str] = "?"
    reference: ClassVar[str] = ""
    keep_precision: ClassVar[Mapping[str, str]] = {}
    output_projection: ClassVar[str | None] = None
    host_synchronized: ClassVar[bool] = False
    pre_norm: ClassVar[bool] = True
    shared: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        d_model: int,
        config: Any,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.config = config

    @classmethod
    def check(cls, d_model: int, config: Any) -> None:
        """Refuse a combination that cannot be built.

        Raises:
            FieldError: names the field to change and a value that works.
        """

    @classmethod
    def source(cls, d_model: int, blocks: Sequence[Block]) -> int | None:
        """Index of the earlier block that the last of `blocks` builds on; None for none.

        Args:
            blocks: the layout's from the input up to this layer's own, every Config field
                written out.

        Raises:
            FieldError: it needs one, and there is none that fits.
        """
        return None

    @classmethod
    def costs(cls, d_model: int, config: Any, *, length: int, bytes_per_element: int = 4) -> Costs:
        """Exact costs for one sequence at a context of `length` tokens.

        Args:
            bytes_per_element: of activations and caches (not of weights).
        """
        raise NotImplementedError(f"{cls.__qualname__}.costs")

    def backends(self, dtype: torch.dtype) -> dict[str, str]:
        """What each operation of a forward pass runs on, on the layer's device, for the record.

        Args:
            dtype: of the activations.

        Returns:
            Operation → backend (`workbench.kernels`); empty for a layer that has torch alone.
        """
        return {}

    def reset_parameters(self) -> None:
        """Initialise what is not a plain linear, in place; linears are done by the model."""

    def init_state(
        self,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """An empty state for `batch_size` sequences of at most `max_length` tokens."""
        return State()

    def forward(self, x_BTD: Tensor, context: Context = PLAIN, state: Any = None) -> Tensor:
        """Outputs for all positions; with a state, continue from it and update it in place."""
        raise NotImplementedError(f"{type(self).__qualname__}.forward")

    def step(self, x_BD: Tensor, state: Any, context: Context = PLAIN) -> Tensor:
        """One token a sequence, `[B, D]` to `[B, D]`, updating `state` in place.

        Args:
            context: with neither padding nor borders.
        """
        return self.forward(x_BD[:, None], context, state)[:, 0]
