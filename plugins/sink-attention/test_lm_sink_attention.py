"""The workbench's contract suite on the layer of this package."""

from lm_sink_attention import SinkAttention

from workbench.testing import LayerContract

Config = SinkAttention.Config


class TestSinkAttention(LayerContract):
    layer = SinkAttention
    captured = True
    configs = (
        Config(num_heads=4, num_kv_heads=2, head_dim=8, num_sinks=3, window=5),
        Config(num_heads=4, num_sinks=3, window=5, position="text", sink_logits=True),
        Config(num_heads=2, num_sinks=0, window=4, sink_logits=True),
        Config(num_heads=2, num_sinks=4, window=1),
        Config(num_heads=2),
    )
