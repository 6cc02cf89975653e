"""Small copies of published models: all of a preset but its sizes, and transformers' own beside it.

The published configurations are those of the hub's config.json; the small copies keep all their
choices and ratios, such as query heads a key-value head and groups of the gated norm.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tests.plugins.published_weights import our_names
from workbench.builder import default_builder
from workbench.layout import Layout
from workbench.model import HybridLM

ROOT = Path(__file__).parents[2]
PUBLISHED: dict[str, dict[str, Any]] = json.loads(
    (ROOT / "plugins" / "workbench_presets" / "published_configs.json").read_text()
)
VOCABULARY = 61
# No end token: generation must not stop early.
UNSET = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
THEIR_NAMES = {
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "pattern": "hybrid_override_pattern",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small:
    """Sizes of a small copy.

    Attributes:
        sizes: what both sides have, under the preset's names.
        ours, theirs: what they say in different ways.
        blocks_per_layer: our blocks to one of their layers.
    """

    sizes: dict[str, Any]
    ours: dict[str, Any] = dataclasses.field(default_factory=dict)
    theirs: dict[str, Any] = dataclasses.field(default_factory=dict)
    blocks_per_layer: int = 2


def shape(d_model: int, num_layers: int, *attention: int, **others: Any) -> dict[str, Any]:
    """Width and depth; then query heads, key-value heads and channels a head, as far as given."""
    names = ("num_heads", "num_kv_heads", "head_dim")
    heads = dict(zip(names, attention, strict=False))
    return {"d_model": d_model, "num_layers": num_layers} | heads | others


MAMBA2 = {"mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
OUR_MAMBA2 = {"mamba_headdim": 16, "d_state": 16}
M, A = "mamba", "attention"

SMALL = {
    "mamba-130m": Small(sizes=shape(64, 3), theirs={"time_step_rank": 4}, blocks_per_layer=1),
    "mamba2-130m": Small(sizes=shape(64, 3), theirs={"num_heads": 2}, blocks_per_layer=1),
    "bamba-9b": Small(
        sizes=shape(64, 4, 8, 2, intermediate_size=96),
        ours=OUR_MAMBA2 | {"attention_layers": (1, 3)},
        theirs=MAMBA2 | {"mamba_n_heads": 8, "attn_layer_indices": [1, 3]},
    ),
    "nemotron-h-8b": Small(
        sizes={
            "d_model": 64, "pattern": "M-M*-M-", "num_heads": 8, "num_kv_heads": 2, "head_dim": 8,
            "intermediate_size": 336,
        },
        ours={"mamba_heads": 16, "mamba_headdim": 8, "d_state": 16},
        theirs={
            "num_hidden_layers": 7, "mamba_num_heads": 16, "mamba_head_dim": 8,
            "ssm_state_size": 16, "chunk_size": 16,
            # Else its prefill clamps step sizes, unlike its decoding and NVIDIA's code.
            "time_step_min": 1e-30,
        },
        blocks_per_layer=1,
    ),
    "granite-4.0-h-350m": Small(
        sizes=shape(96, 4, 12, 4, intermediate_size=128),
        ours=OUR_MAMBA2 | {"attention_layers": (1, 3)},
        theirs=MAMBA2
        | {"mamba_n_heads": 12, "layer_types": [M, A, M, A], "shared_intermediate_size": 128},
    ),
    "granite-4.0-h-micro": Small(
        sizes=shape(64, 3, 8, 2, intermediate_size=256),
        ours=OUR_MAMBA2 | {"attention_layers": (1,)},
        theirs=MAMBA2
        | {"mamba_n_heads": 8, "layer_types": [M, A, M], "shared_intermediate_size": 256},
    ),
    "tinyllama-1.1b": Small(sizes=shape(64, 3, 8, 1, intermediate_size=176)),
    "qwen3-0.6b": Small(sizes=shape(32, 3, 4, 2, 16, intermediate_size=96)),
    "qwen3-1.7b": Small(sizes=shape(64, 2, 4, 2, 16, intermediate_size=192)),
}  # fmt: skip


def their_model(name: str, **changes: Any) -> PreTrainedModel:
    """transformers' class, from the published configuration with some values changed."""
    published = PUBLISHED[name]
    model_class = getattr(transformers, published["model"])
    model: PreTrainedModel = model_class(
        model_class.config_class(**published["config"] | UNSET | changes)
    )
    return model


def their_small_model(name: str, **changes: Any) -> PreTrainedModel:
    """Small and random, no weight of it neutral, so that a forgotten one shows."""
    sizes = {THEIR_NAMES.get(key, key): value for key, value in SMALL[name].sizes.items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = their_model(
            name, **{"vocab_size": VOCABULARY} | sizes | SMALL[name].theirs | changes
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def small_layout(name: str) -> Layout:
    """What the preset's function makes of small sizes and the preset's own other values."""
    make = default_builder().presets[name].layout
    assert isinstance(make, partial)
    layout: Layout = make.func(**make.keywords | SMALL[name].sizes | SMALL[name].ours)
    return default_builder().resolve(layout.replace(vocab_size=VOCABULARY))


def with_weights(layout: Layout, name: str, theirs: PreTrainedModel) -> HybridLM:
    """The layout built, with their weights."""
    model = default_builder().build(layout)
    model.load_state_dict(our_names(theirs.state_dict(), SMALL[name].blocks_per_layer))
    return model.eval()


@cache
def pair(name: str) -> tuple[HybridLM, PreTrainedModel]:
    """Our small copy and theirs, with the same weights. Leave them as they are."""
    theirs = their_small_model(name)
    return with_weights(small_layout(name), name, theirs), theirs
