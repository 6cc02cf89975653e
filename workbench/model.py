"""HybridLM: embedding, residual blocks `x + layer(norm(x))`, final norm, head.

Shape suffixes: B batch, T tokens in this call, D d_model, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from workbench.errors import FieldError, WorkbenchError
from workbench.layer import PLAIN, Context, Layer, State
from workbench.layout import Layout
from workbench.linear_cross_entropy import linear_cross_entropy

IGNORE = -100  # target id without a loss, as in torch and transformers


def sources_of(layout: Layout, layers: Sequence[type[Layer]]) -> list[int | None]:
    """For each block of a resolved layout the earlier one that it builds on, or None.

    Raises:
        FieldError: a block's source is missing or does not fit.
    """
    sources: list[int | None] = []
    for index, layer in enumerate(layers):
        where = f"blocks[{index}] ({layout.blocks[index].layer})"
        try:
            source = layer.source(layout.d_model, layout.blocks[: index + 1])
        except WorkbenchError as error:
            raise error.within(where) from None
        if source is not None and not 0 <= source < index:
            raise FieldError(where, f"must build on an earlier block, not on block {source}")
        if source is not None and layer.shared and layout.blocks[source] != layout.blocks[index]:
            raise FieldError(
                where, f"shares weights with block {source}: give both one config and quantizer"
            )
        sources.append(source)
    return sources


def make_norm(layout: Layout, **factory: Any) -> nn.Module:
    """The layout's norm over the last dimension."""
    if layout.norm == "rmsnorm":
        return nn.RMSNorm(layout.d_model, eps=layout.norm_eps, **factory)
    return nn.LayerNorm(layout.d_model, eps=layout.norm_eps, **factory)


class ResidualBlock(nn.Module):
    """`x + residual_multiplier * layer(norm(x))`, without the norm where the layer has its own."""

    def __init__(self, layout: Layout, layer: Layer, **factory: Any) -> None:
        super().__init__()
        self.norm = make_norm(layout, **factory) if layer.pre_norm else nn.Identity()
        self.layer = layer
        self.multiplier = layout.residual_multiplier

    def forward(self, x_BTD: Tensor, context: Context, state: State | None) -> Tensor:
        y_BTD: Tensor = self.layer(self.norm(x_BTD), context, state)
        return x_BTD + (y_BTD if self.multiplier == 1.0 else y_BTD * self.multiplier)

    def step(self, x_BD: Tensor, state: State, context: Context) -> Tensor:
        y_BD = self.layer.step(self.norm(x_BD), state, context)
        return x_BD + (y_BD if self.multiplier == 1.0 else y_BD * self.multiplier)


def make_embedding(layout: Layout, **factory: Any) -> nn.Embedding:
    """The token embedding; on the meta device nothing is drawn, for that imports all of dynamo."""
    if torch.device(factory.get("device") or "cpu").type == "meta":
        weight_VD = torch.empty(layout.vocab_size, layout.d_model, **factory)
        return nn.Embedding(layout.vocab_size, layout.d_model, _weight=weight_VD)
    return nn.Embedding(layout.vocab_size, layout.d_model, **factory)


class HybridLM(nn.Module):
    """A causal language model made of the layers that a Layout names.

    Args:
        layout: what it is, every default written out; kept as `model.layout`.
        layers: one built Layer a block, in order. `Builder.build` makes them.
        device, dtype: of embedding, norms and head.

    Attributes:
        sources: for each block the earlier one that it builds on, or None.
        checkpointed: whether training keeps each block's input alone and computes the rest again.

    Raises:
        FieldError: a block's source is missing or does not fit.
    """

    def __init__(self, layout: Layout, layers: Sequence[Layer], **factory: Any) -> None:
        super().__init__()
        self.layout = layout
        self.embedding = make_embedding(layout, **factory)
        self.blocks = nn.ModuleList(ResidualBlock(layout, layer, **factory) for layer in layers)
        self.norm_f = make_norm(layout, **factory)
        self.lm_head = nn.Linear(layout.d_model, layout.vocab_size, bias=False, **factory)
        self.sources = sources_of(layout, [type(layer) for layer in layers])
        self.checkpointed = False
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share what belongs to several: embedding and head, and the blocks' shared modules."""
        if self.layout.tie_embeddings:
            self.lm_head.weight = self.embedding.weight
        for layer, source in zip(self.layers, self.sources, strict=True):
            if source is not None:
                for name in layer.shared:
                    # Not as a child: the modules are the source's to list, save and move.
                    delattr(layer, name)
                    object.__setattr__(layer, name, getattr(self.layers[source], name))

    @property
    def tied(self) -> dict[str, str]:
        """Keys of the state dict whose tensor has an earlier key, too, and that key."""
        first: dict[int, str] = {}
        named = [
            *self.named_parameters(remove_duplicate=False),
            *self.named_buffers(remove_duplicate=False),
        ]
        keys = {name: first.setdefault(id(tensor), name) for name, tensor in named}
        return {name: key for name, key in keys.items() if name != key}

    @property
    def layers(self) -> list[Layer]:
        """The layers from the input up."""
        return [block.layer for block in self.blocks]  # type: ignore[misc]

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def num_parameters(self) -> int:
        """Trainable numbers, tied weights counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def reset_parameters(self, std: float = 0.02) -> None:
        """Initialise everything in place under torch's global generator.

        Linears and embedding are normal with `std`; the linear of each layer that writes to the
        residual stream is divided by the square root of the number of blocks (GPT-2, mamba-ssm);
        each layer then sets what it publishes its own scheme for.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
                module.reset_parameters()
        projections: dict[int, Tensor] = {}  # a shared one counts once
        for layer in self.layers:
            layer.reset_parameters()
            if layer.output_projection is not None:
                weight: Any = layer.get_submodule(layer.output_projection).weight
                projections[id(weight)] = weight
        with torch.no_grad():
            for weight in projections.values():
                weight.div_(math.sqrt(len(self.blocks)))

    def init_state(
        self, batch_size: int, max_length: int, *, dtype: torch.dtype | None = None
    ) -> list[State]:
        """One empty state a block, on the model's device.

        Args:
            max_length: tokens a sequence may reach, prompt included.
            dtype: of attention caches; the weights' own by default.
        """
        dtype = dtype or self.embedding.weight.dtype
        return [
            layer.init_state(batch_size, max_length, device=self.device, dtype=dtype)
            for layer in self.layers
        ]

    def hidden(
        self, tokens_BT: Tensor, context: Context = PLAIN, states: Sequence[State] | None = None
    ) -> Tensor:
        """Normed activations before the head, `[B, T, D]`; fills `states` if given."""
        if context.prefix_lengths_B is not None and not self.layout.prefix_lm:
            raise ValueError("prefix lengths were given to a layout without prefix_lm")
        return self.norm_f(self.run_blocks(self._embed(tokens_BT), context, states))  # type: ignore[no-any-return]

    def run_blocks(
        self, x_BTD: Tensor, context: Context = PLAIN, states: Sequence[State] | None = None
    ) -> Tensor:
        """From the embedded tokens to the residual stream after the last block, `[B, T, D]`."""
        contexts = self._contexts(dataclasses.replace(context, embedding_BTD=x_BTD))
        for index, block in enumerate(self.blocks):
            arguments = x_BTD, next(contexts), None if states is None else states[index]
            if self.checkpointed and self.training and torch.is_grad_enabled():
                x_BTD = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x_BTD = block(*arguments)
        return x_BTD

    def step_blocks(self, x_BD: Tensor, states: Sequence[State]) -> Tensor:
        """`run_blocks` on one token a sequence, `[B, D]` to `[B, D]`."""
        contexts = self._contexts(Context(embedding_BTD=x_BD[:, None]))
        for block, state in zip(self.blocks, states, strict=True):
            x_BD = block.step(x_BD, state, next(contexts))  # type: ignore[operator]
        return x_BD

    def _embed(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embedding(tokens)
        multiplier = self.layout.embedding_multiplier
        return x if multiplier == 1.0 else x * multiplier

    def _contexts(self, context: Context) -> Iterator[Context]:
        """What each block may know; one that another reads has somewhere to publish."""
        published: dict[int | None, dict[str, Tensor | None]]
        published = {source: {} for source in self.sources if source is not None}
        for index, source in enumerate(self.sources):
            reads, writes = published.get(source), published.get(index)
            if reads is None and writes is None:
                yield context
            else:
                yield dataclasses.replace(context, source=reads, published=writes)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head on `[..., D]`: `[..., V]`."""
        scores = self.lm_head(hidden)
        scaling = self.layout.logits_scaling
        return scores if scaling == 1.0 else scores / scaling  # type: ignore[no-any-return]

    def forward(
        self, tokens_BT: Tensor, context: Context = PLAIN, states: Sequence[State] | None = None
    ) -> Tensor:
        """Logits `[B, T, V]` for every position; with `states`, continue from and update them."""
        return self.logits(self.hidden(tokens_BT, context, states))

    def prefill(
        self, tokens_BT: Tensor, states: Sequence[State], context: Context = PLAIN
    ) -> Tensor:
        """Fill `states` with a prompt; logits `[B, V]` of its last position only."""
        return self.logits(self.hidden(tokens_BT, context, states)[:, -1])

    def step(self, tokens_B: Tensor, states: Sequence[State]) -> Tensor:
        """One decode step: logits `[B, V]` after the tokens `[B]`; updates `states` in place."""
        return self.logits(self.norm_f(self.step_blocks(self._embed(tokens_B), states)))

    def loss(
        self,
        inputs_BT: Tensor,
        targets_BT: Tensor,
        context: Context = PLAIN,
        reduction: str = "mean",
    ) -> Tensor:
        """Cross entropy in nats over the targets that are not `IGNORE` (-100).

        Args:
            reduction: `"mean"` a target, or `"sum"`.
        """
        if inputs_BT.is_cuda and type(self.lm_head) is nn.Linear:
            return linear_cross_entropy(
                self.hidden(inputs_BT, context).flatten(0, 1),
                self.lm_head.weight,
                targets_BT.flatten(),
                scaling=self.layout.logits_scaling,
                ignore_index=IGNORE,
                reduction=reduction,
            )
        logits_BTV = self(inputs_BT, context)
        return F.cross_entropy(
            logits_BTV.flatten(0, 1).float(),
            targets_BT.flatten(),
            ignore_index=IGNORE,
            reduction=reduction,
        )


def backends_of(model: HybridLM, *, half: bool = False) -> dict[str, dict[str, str]]:
    """What each layer type's operations run on: layer → operation → backend (`Layer.backends`).

    Args:
        half: whether activations are bfloat16 (autocast), not of the weights' dtype.

    Returns:
        Blocks of a type that differ (in their sizes, say) are joined by commas.
    """
    dtype = torch.bfloat16 if half else model.embedding.weight.dtype
    found: dict[str, dict[str, str]] = {}
    for block, layer in zip(model.layout.blocks, model.layers, strict=True):
        known = found.setdefault(block.layer, {})
        for operation, backend in layer.backends(dtype).items():
            seen = known[operation].split(", ") if operation in known else []
            known[operation] = ", ".join(dict.fromkeys([*seen, backend]))
    return found
