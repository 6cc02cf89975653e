"""The workbench's contract suite on the layers of this package."""

from __future__ import annotations

import torch
from lm_shared_attention import SharedAttention, SharedAttentionConfig, Zamba2, Zamba2Config

from workbench.testing import LayerContract


class TestSharedAttention(LayerContract):
    layer = SharedAttention
    captured = True
    in_model = True
    configs = (
        SharedAttentionConfig(num_heads=4, adapter_rank=4),
        SharedAttentionConfig(
            num_heads=4, num_kv_heads=2, position="none", expand=2, attention_adapter=True
        ),
    )


class TestSharedTwice(TestSharedAttention):
    def earlier(self, config):
        return [(self.name, self.layer, config)]


class TestZamba2(LayerContract):
    layer = Zamba2
    captured = True
    in_model = True
    configs = (
        Zamba2Config(num_heads=4, headdim=16, d_state=8, chunk_size=8, adapter_rank=4),
        Zamba2Config(
            num_heads=4, position="none", attention_adapter=True, headdim=32, d_state=4, group=1
        ),
    )

    def earlier(self, config):
        return [(self.name, self.layer, config)]


def test_they_say_what_their_parts_run_on() -> None:
    zamba = Zamba2(32, Zamba2Config(num_heads=4, headdim=16))
    attention = zamba.transformer.attention.backends(torch.bfloat16)
    mamba = zamba.mamba.backends(torch.bfloat16)
    assert zamba.backends(torch.bfloat16) == {**attention, **mamba}
    assert SharedAttention.backends(zamba, torch.bfloat16) == attention
    assert attention
    assert mamba
