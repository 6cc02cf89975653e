"""transformers' names and shapes of a mixture's weights, brought to ours; for the tests.

transformers 5 stores experts as two parameters, `gate_up_proj` `[E, 2·width, D]` and `down_proj`
`[E, D, width]`; here each expert holds three linears. Gradients are brought over in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

RENAMED = {
    "gate.weight": "router.weight",
    "shared_mlp.output_linear.weight": "shared_expert.down_proj.weight",
}
GRANITE_SHARED = "shared_mlp.input_linear.weight"  # its gate_proj stacked on its up_proj


def mixture(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A mixture's tensors under our names."""
    ours = {}
    for name, tensor in theirs.items():
        if name == "experts.gate_up_proj":
            for index, expert in enumerate(tensor.unbind()):
                gate, up = expert.chunk(2)
                ours[f"experts.{index}.gate_proj.weight"] = gate
                ours[f"experts.{index}.up_proj.weight"] = up
        elif name == "experts.down_proj":
            for index, expert in enumerate(tensor.unbind()):
                ours[f"experts.{index}.down_proj.weight"] = expert
        elif name == GRANITE_SHARED:
            gate, up = tensor.chunk(2)
            ours["shared_expert.gate_proj.weight"] = gate
            ours["shared_expert.up_proj.weight"] = up
        else:
            ours[RENAMED.get(name, name)] = tensor
    return ours


OUTSIDE = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm_f.weight",
    "model.final_layernorm.weight": "norm_f.weight",
    "lm_head.weight": "lm_head.weight",
}
# Part of one of their layers: which of our two blocks it is, and what in it.
PARTS = {
    "input_layernorm": (0, "norm"),
    "self_attn": (0, "layer"),
    "mamba": (0, "layer"),
    "post_attention_layernorm": (1, "norm"),
    "pre_ff_layernorm": (1, "norm"),
    "feed_forward": (1, "layer"),
    "block_sparse_moe": (1, "layer"),
    "shared_mlp": (1, "layer"),
}


def model(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a whole Jamba or Granite under our names."""
    ours = {}
    for name, tensor in theirs.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(\w+)\.(.+)", name)
        if match is None:
            ours[OUTSIDE[name]] = tensor
            continue
        offset, part = PARTS[match[2]]
        inner = f"shared_mlp.{match[3]}" if match[2] == "shared_mlp" else match[3]
        for ours_inner, piece in mixture({inner: tensor}).items():
            ours[f"blocks.{2 * int(match[1]) + offset}.{part}.{ours_inner}"] = piece
    return ours
