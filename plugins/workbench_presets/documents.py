"""The model sizes that five project documents name, each as near to its document as it can be.

What a document leaves open is taken from the configuration files of its own repository, then from
the method's paper. No figure is tuned to meet a claim: where the exact count differs, it shows.
"""

from __future__ import annotations

import math
from functools import partial

from workbench.layout import Block, Layout, Named
from workbench.preset import Preset
from workbench_placement.mixed import PrefixSuffix, Strategic
from workbench_presets.stacks import substitute, swiglu, with_swiglu

MAMBA = Block(layer="mamba", config={"d_state": 16, "d_conv": 4, "expand": 2})
MOAI_VOCAB = 128_000
MOAI_FFN_RATIO = 2.75  # intermediate_size 5632 at hidden_size 2048


def mamba_glm(d_model: int, num_layers: int) -> Layout:
    """A prefix of Mamba and a suffix of attention, two to one, a SwiGLU after each."""
    attention = Block(
        layer="attention",
        config={
            "head_dim": 64,
            "num_heads": d_model // 64,
            "num_kv_heads": d_model // 256,
            "rope_theta": 1e6,
        },
    )
    placed = PrefixSuffix.place(
        num_layers,
        ("mamba", "attention"),
        PrefixSuffix.Config(majority="mamba", minority="attention", ratio=2),
    )
    mlp = swiglu(int(MOAI_FFN_RATIO * d_model))
    return Layout(
        d_model=d_model,
        vocab_size=MOAI_VOCAB,
        blocks=substitute(placed, {"mamba": (MAMBA, mlp), "attention": (attention, mlp)}),
        prefix_lm=True,
    )


MAMBA_GLM_OPEN = (
    "The document gives vocabulary, d_state, expand, RoPE theta 1e6 and 2:1 placement. "
    "{width} The rest is open: a SwiGLU of 2.75 x d_model after every mixer and RMSNorm 1e-5, as "
    "in MOAI-LLM, its sibling document; heads of 64 channels, four query heads a key-value head; "
    "tied embeddings. Its Mamba layers read the prefix in both directions; here only attention "
    "does, which changes no count."
)


def moai(d_model: int, num_layers: int, intermediate_size: int) -> Layout:
    """Mamba and SwiGLU, alternating."""
    return Layout(
        d_model=d_model,
        vocab_size=MOAI_VOCAB,
        blocks=with_swiglu([MAMBA] * num_layers, intermediate_size),
    )


MOAI_OPEN = (
    "Embeddings are tied, as the model class of its repository declares (transformers' default). "
    "{ffn} The document states SwiGLU 'via FFN', though the repository's block has none."
)


def bitbyte() -> Layout:
    """BitLinear-Mamba and SwiGLU, alternating, on bytes; the ternaries stored packed."""
    mixer = Block(
        layer="bitlinear_mamba",
        config={
            "d_state": 16,
            "d_conv": 4,
            "expand": 2,
            "dt_rank": 16,
            "bit_x_proj": True,
            "bit_dt_proj": True,
        },
        quantizer=Named(name="b1_58"),
    )
    return Layout(d_model=1536, vocab_size=256, blocks=with_swiglu([mixer] * 24, 4096))


BITBYTE_OPEN = (
    "The delta projection goes from d_inner to d_state: dt_rank = 16. BitLinear on in, out, delta "
    "and B/C projections, as listed; the SwiGLU, which the list leaves out, is not ternary. Norm "
    "epsilon 1e-5; tied embeddings, as in its repository's MambaMLM."
)

# name → stated parameters; d_model, layers, attention layers, query heads, key-value heads
HYBRID_SLM = {
    "1.3b": ("1.44B", (2048, 24, 9, 16, 4)),
    "2.7b": ("2.56B", (2560, 32, 12, 20, 4)),
    "6.7b": ("5.96B", (4096, 32, 12, 32, 8)),
    "13b": ("10.66B", (5120, 40, 14, 40, 8)),
}


def hybrid_slm(
    d_model: int, num_layers: int, attention_layers: int, num_heads: int, num_kv_heads: int
) -> Layout:
    """Mamba, with transformer blocks (attention and SwiGLU) early, spaced midway, and on top."""
    early, top = 2, 3
    placed = Strategic.place(
        num_layers,
        ("mamba", "attention"),
        Strategic.Config(
            majority="mamba",
            minority="attention",
            early=early,
            middle=attention_layers - early - top,
            top=top,
        ),
    )
    attention = Block(
        layer="attention", config={"num_heads": num_heads, "num_kv_heads": num_kv_heads}
    )
    return Layout(
        d_model=d_model,
        vocab_size=128_256,
        blocks=substitute(
            placed, {"mamba": (MAMBA,), "attention": (attention, swiglu(4 * d_model))}
        ),
        norm="layernorm",
    )


HYBRID_SLM_OPEN = (
    "Open in the document, from its repository's production_config.py and production_model.py: "
    "35 % of the layers, rounded up, are transformer blocks; query and key-value heads; a "
    "vocabulary of 128,256; SwiGLU of 4 x d_model in transformer blocks only; LayerNorm 1e-5; tied "
    "embeddings. Placed as the document says: the first 2, the last 3, the others evenly between. "
    "Mamba is the published one. The stated count is that file's own estimate, which counts the "
    "tied embedding twice."
)


def llm_lab() -> Layout:
    """Nothing but Mamba-2."""
    d_model = 2048
    config = {"d_state": 16, "d_conv": 4, "expand": 2, "headdim": 64, "n_groups": 1}
    return Layout(
        d_model=d_model,
        vocab_size=32_768,
        blocks=(Block(layer="mamba2", config={**config, "chunk_size": 256}),) * 28,
        norm_eps=1e-6,
        embedding_multiplier=math.sqrt(d_model),
    )


LLM_LAB_OPEN = (
    "The document's JSON, with heads of 64 channels in one group (the defaults of mamba-ssm, which "
    "it runs). From its repository: tied embeddings, scaled by sqrt(d_model), and norm epsilon "
    "1e-6. No MLP: neither document nor code has one."
)


def presets() -> dict[str, Preset]:
    """Every size that the documents name."""
    return {
        **_mamba_glm_presets(),
        **_moai_presets(),
        "bitbytelm-mamba": Preset(
            layout=bitbyte, source="Mamba Integration with BitByteLM", assumptions=BITBYTE_OPEN
        ),
        **_hybrid_slm_presets(),
        "llm-lab-mamba2-1.4b": Preset(
            layout=llm_lab,
            source="Mamba2 Support in LLM-Lab (github.com/blazux/LLM-Lab)",
            stated_parameters="~1.4B",
            assumptions=LLM_LAB_OPEN,
        ),
    }


def _mamba_glm_presets() -> dict[str, Preset]:
    return {
        f"mamba-glm-{size}": Preset(
            layout=partial(mamba_glm, *shape),
            source="Mamba-GLM: Hybrid Architecture for Small LLMs (Open MoAI Team, 2025)",
            stated_parameters=stated,
            assumptions=MAMBA_GLM_OPEN.format(width=width),
        )
        for size, stated, shape, width in (
            ("tiny", "300M", (1024, 12), "Tiny's d_model is open: 1024, half of Small's."),
            ("small", "1.5B", (2048, 24), "Small's d_model is that of its example, 2048."),
        )
    }


def _moai_presets() -> dict[str, Preset]:
    theirs = (
        "Its intermediate_size is open: {}, from its repository's configs/mamba_config_{}.json."
    )
    return {
        f"moai-{size}": Preset(
            layout=partial(moai, *shape),
            source="MOAI-LLM: Pure Mamba SSM Language Model (github.com/sh2orc/moai-llm)",
            stated_parameters=stated,
            assumptions=MOAI_OPEN.format(ffn=ffn),
        )
        for size, stated, shape, ffn in (
            ("2b", "~2.1B", (2048, 24, 5632), "Its intermediate_size is the document's."),
            ("8b", "~8.2B", (4096, 40, 11264), theirs.format(11264, "8b")),
            ("16b", "~16.4B", (5120, 48, 13824), theirs.format(13824, "16b")),
        )
    }


def _hybrid_slm_presets() -> dict[str, Preset]:
    return {
        f"hybrid-slm-{size}": Preset(
            layout=partial(hybrid_slm, *shape),
            source="Production-Grade Hybrid Mamba-Transformer SLM "
            "(github.com/i-soumya18/MAMBA_SLM)",
            stated_parameters=stated,
            assumptions=HYBRID_SLM_OPEN,
        )
        for size, (stated, shape) in HYBRID_SLM.items()
    }
