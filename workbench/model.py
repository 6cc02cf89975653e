"""HybridLM: embedding, residual blocks `x + layer(norm(x))`, final norm, head.

Shape suffixes: B batch, T tokens in this call, D d_model, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.layer import PLAIN, Context, Layer, State
from workbench.layout import Layout

IGNORE = -100  # target id without a loss, as in torch and transformers


def make_norm(layout: Layout, **factory: Any) -> nn.Module:
    """The layout's norm over the last dimension."""
    if layout.norm == "rmsnorm":
        return nn.RMSNorm(layout.d_model, eps=layout.norm_eps, **factory)
    return nn.LayerNorm(layout.d_model, eps=layout.norm_eps, **factory)


class ResidualBlock(nn.Module):
    """`x + residual_multiplier * layer(norm(x))`."""

    def __init__(self, layout: Layout, layer: Layer, **factory: Any) -> None:
        super().__init__()
        self.norm = make_norm(layout, **factory)
        self.layer = layer
        self.multiplier = layout.residual_multiplier

    def forward(self, x_BTD: Tensor, context: Context, state: State | None) -> Tensor:
        y_BTD: Tensor = self.layer(self.norm(x_BTD), context, state)
        return x_BTD + (y_BTD if self.multiplier == 1.0 else y_BTD * self.multiplier)

    def step(self, x_BD: Tensor, state: State) -> Tensor:
        y_BD = self.layer.step(self.norm(x_BD), state)
        return x_BD + (y_BD if self.multiplier == 1.0 else y_BD * self.multiplier)


class HybridLM(nn.Module):
    """A causal language model made of the layers that a Layout names.

    Args:
        layout: what it is; kept as `model.layout`.
        layers: one built Layer a block, in order. `Builder.build` makes them.
        device, dtype: of embedding, norms and head.
    """

    def __init__(self, layout: Layout, layers: Sequence[Layer], **factory: Any) -> None:
        super().__init__()
        self.layout = layout
        self.embedding = nn.Embedding(layout.vocab_size, layout.d_model, **factory)
        self.blocks = nn.ModuleList(ResidualBlock(layout, layer, **factory) for layer in layers)
        self.norm_f = make_norm(layout, **factory)
        self.lm_head = nn.Linear(layout.d_model, layout.vocab_size, bias=False, **factory)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head share the embedding's weights, where the layout says so."""
        if self.layout.tie_embeddings:
            self.lm_head.weight = self.embedding.weight

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
        for layer in self.layers:
            layer.reset_parameters()
            if layer.output_projection is not None:
                weight = layer.get_submodule(layer.output_projection).weight
                with torch.no_grad():
                    weight.div_(math.sqrt(len(self.blocks)))  # type: ignore[operator]

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
        x_BTD = self.embedding(tokens_BT)
        if self.layout.embedding_multiplier != 1.0:
            x_BTD = x_BTD * self.layout.embedding_multiplier
        for index, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, context, None if states is None else states[index])
        return self.norm_f(x_BTD)  # type: ignore[no-any-return]

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
        x_BD = self.embedding(tokens_B)
        if self.layout.embedding_multiplier != 1.0:
            x_BD = x_BD * self.layout.embedding_multiplier
        for block, state in zip(self.blocks, states, strict=True):
            x_BD = block.step(x_BD, state)  # type: ignore[operator]
        return self.logits(self.norm_f(x_BD))

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
        logits_BTV = self(inputs_BT, context)
        return F.cross_entropy(
            logits_BTV.flatten(0, 1).float(),
            targets_BT.flatten(),
            ignore_index=IGNORE,
            reduction=reduction,
        )
