"""Hybrid language models for transformers, made of the very layers that they were trained with.

Shape suffixes: B batch, T tokens in this call, D d_model, V vocabulary.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from workbench.config import from_dict
from workbench.layer import Context
from workbench.layout import Layout
from workbench.model import HybridLM
from workbench_export.cache import WorkbenchCache
from workbench_export.configuration_workbench import WorkbenchConfig
from workbench_export.registered import LAYERS, QUANTIZERS


def build(layout: Layout) -> HybridLM:
    """The model that a layout describes, on torch's default device and in its default dtype.

    Freshly initialised, unless on the meta device, with the layout's quantizers applied.
    """
    layers = []
    for block in layout.blocks:
        layer = LAYERS[block.layer]
        layers.append(layer(layout.d_model, from_dict(layer.Config, block.config)))
    model = HybridLM(layout, layers)
    if model.device.type != "meta":
        model.reset_parameters()
    for block, built in zip(layout.blocks, layers, strict=True):
        if block.quantizer is not None:
            quantizer = QUANTIZERS[block.quantizer.name]
            config: Any = from_dict(quantizer.Config, block.quantizer.config)
            quantizer.quantize(built, config)
    model.tie_weights()
    return model


def make_context(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    seq_idx: Tensor | None,
    prefix_lengths: Tensor | None,
) -> Context:
    """What the layers may know of this call; the mask may cover the tokens before it too.

    Raises:
        ValueError: a mask that is not `[batch, tokens]`.
    """
    mask_BT = None
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.shape[1] < input_ids.shape[1]:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: give [batch, tokens], "
                "1 for tokens and 0 for padding."
            )
        mask_BT = attention_mask[:, -input_ids.shape[1] :].bool()
        # Without padding, layers may take paths that know no mask.
        if not torch.compiler.is_compiling() and bool(mask_BT.all()):
            mask_BT = None
    return Context(attention_mask_BT=mask_BT, seq_idx_BT=seq_idx, prefix_lengths_B=prefix_lengths)


class WorkbenchPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What the classes below share: the model itself, `self.model`, and how it is initialised."""

    config_class = WorkbenchConfig
    supports_gradient_checkpointing = False
    _is_stateful = True
    _no_split_modules: ClassVar[list[str]] = ["ResidualBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "model.lm_head.weight": "model.embedding.weight"
    }

    def __init__(self, config: WorkbenchConfig) -> None:
        super().__init__(config)
        self.model = build(config.to_layout())
        self.post_init()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise what a checkpoint lacked, and nothing that it held.

        A model that was built without one is initialised already.
        """
        tensors = list(self.state_dict(keep_vars=True).values())
        loaded = [tensor for tensor in tensors if getattr(tensor, "_is_hf_initialized", False)]
        if loaded and len(loaded) < len(tensors):
            values = [tensor.clone() for tensor in loaded]
            self.model.reset_parameters()
            for tensor, value in zip(loaded, values, strict=True):
                tensor.copy_(value)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embedding = value

    def _hidden(
        self,
        input_ids: Tensor,
        context: Context,
        past_key_values: WorkbenchCache | None,
        use_cache: bool,
    ) -> tuple[Tensor, WorkbenchCache | None]:
        """Normed activations `[B, T, D]`, and the cache that took the tokens in, if any."""
        if past_key_values is None and use_cache:
            past_key_values = WorkbenchCache()
        if past_key_values is None:
            return self.model.hidden(input_ids, context), None
        _check_cache(past_key_values)
        return past_key_values.hidden(self.model, input_ids, context), past_key_values


class WorkbenchModel(WorkbenchPreTrainedModel):
    """Tokens to the normed activations before the head."""

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: WorkbenchCache | None = None,
        use_cache: bool = False,
        seq_idx: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
    ) -> BaseModelOutputWithPast:
        """Activations `[B, T, D]`; see `WorkbenchForCausalLM.forward` for the arguments."""
        context = make_context(input_ids, attention_mask, seq_idx, prefix_lengths)
        hidden_BTD, cache = self._hidden(input_ids, context, past_key_values, use_cache)
        return BaseModelOutputWithPast(last_hidden_state=hidden_BTD, past_key_values=cache)


class WorkbenchForCausalLM(WorkbenchPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Tokens to next-token logits; `generate()` keeps each layer's own state."""

    def get_output_embeddings(self) -> nn.Module:
        return self.model.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.model.lm_head = value

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: WorkbenchCache | None = None,
        use_cache: bool = False,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        seq_idx: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits `[B, T, V]`, and the loss where there are labels.

        Args:
            input_ids: `[B, T]`; with a cache, the tokens after those that it has seen.
            attention_mask: `[B, T]` or `[B, seen + T]`, 0 at padding; for generation, pad left.
            past_key_values: a `WorkbenchCache`, updated in place.
            use_cache: make a cache where none is given.
            labels: `[B, T]`, shifted here; -100 carries no loss.
            logits_to_keep: only these last positions (a number), or these positions (indices).
            seq_idx: `[B, T]`, the document of each token in a packed row.
            prefix_lengths: `[B]`, how many first columns of a row (padding included) attention
                sees in both directions; for models trained so.
        """
        context = make_context(input_ids, attention_mask, seq_idx, prefix_lengths)
        if self._can_step(input_ids, past_key_values, context):
            assert past_key_values is not None
            logits_BTV = past_key_values.step(self.model, input_ids[:, 0])[:, None]
            cache: WorkbenchCache | None = past_key_values
        else:
            hidden_BTD, cache = self._hidden(input_ids, context, past_key_values, use_cache)
            if isinstance(logits_to_keep, int):
                hidden_BTD = hidden_BTD[:, -logits_to_keep:]
            else:
                hidden_BTD = hidden_BTD[:, logits_to_keep]
            logits_BTV = self.model.logits(hidden_BTD)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, past_key_values=cache)

    def _can_step(self, input_ids: Tensor, cache: WorkbenchCache | None, context: Context) -> bool:
        """Whether this call is one plain decode step, which the layers have a leaner path for."""
        # Accelerate moves activations between devices in forward hooks, which a step passes by.
        spread = len(set((getattr(self, "hf_device_map", None) or {}).values())) > 1
        return (
            isinstance(cache, WorkbenchCache)
            and cache.length > 0
            and input_ids.shape[1] == 1
            and context.attention_mask_BT is None
            and context.seq_idx_BT is None
            and not spread
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *arguments: Any
    ) -> None:
        # Spares states that would outgrow their size on the way; without it, `forward` makes one.
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *arguments)
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = WorkbenchCache(generation_config.max_length)


def _check_cache(cache: Any) -> None:
    if not isinstance(cache, WorkbenchCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}, which cannot hold the states of these "
            "layers: pass none and use_cache=True, or what an earlier call returned."
        )
