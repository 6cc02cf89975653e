"""What transformers calls the weights of its models, under a HybridLM's names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

LAYER = re.compile(r"(?:model|backbone)\.layers\.(\d+)\.(\w+)\.(.+)")
OUTSIDE = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.embeddings.weight": "embedding.weight",
    "backbone.embeddings.weight": "embedding.weight",
    "model.norm.weight": "norm_f.weight",
    "model.norm_f.weight": "norm_f.weight",
    "model.final_layernorm.weight": "norm_f.weight",
    "backbone.norm_f.weight": "norm_f.weight",
    "lm_head.weight": "lm_head.weight",
}
# Part of one of their layers: which of our blocks it is, counted in the layer, and what in it.
PARTS = {
    "input_layernorm": (0, "norm"),
    "norm": (0, "norm"),
    "self_attn": (0, "layer"),
    "mamba": (0, "layer"),
    "mixer": (0, "layer"),
    "post_attention_layernorm": (1, "norm"),
    "pre_ff_layernorm": (1, "norm"),
    "mlp": (1, "layer"),
    "feed_forward": (1, "layer"),
    "shared_mlp": (1, "layer"),
}


def our_names(theirs: Mapping[str, Tensor], blocks_per_layer: int) -> dict[str, Tensor]:
    """Their state dict under our names."""
    ours = {}
    for name, tensor in theirs.items():
        match = LAYER.fullmatch(name)
        if match is None:
            ours[OUTSIDE[name]] = tensor
            continue
        offset, part = PARTS[match[2]]
        prefix = f"blocks.{blocks_per_layer * int(match[1]) + offset}.{part}."
        if match[3] == "input_linear.weight":  # Granite stacks gate on up
            ours[prefix + "gate_proj.weight"], ours[prefix + "up_proj.weight"] = tensor.chunk(2)
        else:
            ours[prefix + match[3].replace("output_linear", "down_proj")] = tensor
    return ours
