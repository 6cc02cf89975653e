"""The workbench's contract suite on the layer of this package."""

from lm_linear_attention import LinearAttention

from workbench.testing import LayerContract


class TestLinearAttention(LayerContract):
    layer = LinearAttention
    configs = (LinearAttention.Config(), LinearAttention.Config(num_heads=1))
