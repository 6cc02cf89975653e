"""The peers of `gpu_speed.py`: other libraries' models of the same sizes, as their users run them.

fp32 weights under bfloat16 autocast, AdamW (fused), cross entropy of float32 logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

VOCABULARY = 50_280
HYBRID_ATTENTION = (5, 11, 17, 23)
ATTENTION = {"num_heads": 12, "num_heads_kv": 4, "rotary_emb_dim": 64, "causal": True}


def mamba_ssm_model(name: str, dtype: torch.dtype) -> Any:
    """mamba_ssm's language model of a row of the table."""
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    config = MambaConfig(
        d_model=768,
        n_layer=24,
        vocab_size=VOCABULARY,
        ssm_cfg={"layer": "Mamba1" if name == "mamba1" else "Mamba2"},
        attn_layer_idx=list(HYBRID_ATTENTION) if name == "hybrid" else [],
        attn_cfg=ATTENTION if name == "hybrid" else {},
        pad_vocab_size_multiple=8,
    )
    return MambaLMHeadModel(config, device="cuda", dtype=dtype)


def transformers_model(name: str) -> Any:
    """transformers' language model of a row of the table, in float32."""
    import transformers

    if name == "mamba2":
        config: Any = transformers.Mamba2Config(
            hidden_size=768,
            num_hidden_layers=24,
            vocab_size=VOCABULARY,
            num_heads=24,
            head_dim=64,
            n_groups=1,
            state_size=128,
            tie_word_embeddings=True,
            use_cache=False,
        )
        model: Any = transformers.Mamba2ForCausalLM
    else:
        config = transformers.LlamaConfig(
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=4,
            vocab_size=VOCABULARY,
            tie_word_embeddings=True,
            use_cache=False,
        )
        model = transformers.LlamaForCausalLM
    with torch.device("cuda"):
        return model(config)


def training_step(model: Any, compiled: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """One step of a peer: inputs and targets `[B, T]` to the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    call = torch.compile(model) if compiled else model

    def step(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits_BTV = call(inputs_BT).logits
        loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def mamba_ssm_generation(model: Any, prompt_BT: Tensor, new: int) -> Callable[[], object]:
    """mamba_ssm's greedy decoding with its CUDA graph, prefill included."""

    def run() -> object:
        length = prompt_BT.shape[1] + new
        return model.generate(prompt_BT, max_length=length, top_k=1, cg=True)

    return run
