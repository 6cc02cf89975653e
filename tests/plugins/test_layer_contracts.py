"""Every built-in layer keeps the contract that third parties' layers are held to.

Lengths above 64 cross the chunks of the scans; odd ones leave a rest.
"""

from __future__ import annotations

import pytest

from workbench.builder import Builder
from workbench.testing import LayerContract
from workbench_attention.attention import Attention
from workbench_mamba.bitlinear_mamba import BitLinearMamba
from workbench_mamba.mamba import Mamba
from workbench_mamba.mamba2 import Mamba2
from workbench_mlp.relu2 import ReLU2MLP
from workbench_mlp.swiglu import SwiGLU


class TestAttention(LayerContract):
    layer = Attention
    configs = (
        Attention.Config(num_heads=4, num_kv_heads=2, partial_rotary_factor=0.5, qk_norm=True),
        Attention.Config(num_heads=6, num_kv_heads=3, head_dim=4, position="alibi"),
        Attention.Config(num_heads=2, position="alibi", sliding_window=5),
        Attention.Config(num_heads=4, num_kv_heads=1, sliding_window=5, rope_theta=5e5),
        Attention.Config(num_heads=4, head_dim=16, position="none", bias=True, out_bias=True),
    )


class TestMamba(LayerContract):
    layer = Mamba
    lengths = (1, 7, 67)
    configs = (
        Mamba.Config(),
        Mamba.Config(d_state=8, d_conv=3, dt_rank=5, conv_bias=False, bias=True, dt_bc_norm=True),
    )


class TestMamba2(LayerContract):
    layer = Mamba2
    lengths = (1, 7, 67)
    configs = (
        Mamba2.Config(d_state=16, headdim=32),
        Mamba2.Config(
            d_state=8,
            d_conv=2,
            headdim=12,
            num_heads=4,
            n_groups=2,
            chunk_size=16,
            conv_bias=False,
            bias=True,
            grouped_norm=True,
            dt_limit_min=0.01,
            dt_limit_max=0.05,
        ),
    )


class TestBitLinearMamba(LayerContract):
    layer = BitLinearMamba
    configs = (
        BitLinearMamba.Config(),
        BitLinearMamba.Config(bit_x_proj=True, bit_dt_proj=True, dt_bc_norm=True, bias=True),
    )
    straight_through = True
    float32_tolerance = 2e-2  # where an activation's rounding flips, by a level of its 127


class TestSwiGLU(LayerContract):
    layer = SwiGLU
    configs = (SwiGLU.Config(), SwiGLU.Config(intermediate_size=50, bias=True))


class TestReLU2MLP(LayerContract):
    layer = ReLU2MLP
    configs = (ReLU2MLP.Config(), ReLU2MLP.Config(intermediate_size=50, bias=True))


def test_no_built_in_layer_is_left_out(builder: Builder) -> None:
    """A layer that joins the built-in ones must join this file."""
    tested = {
        suite.layer for suite in LayerContract.__subclasses__() if suite.__module__ == __name__
    }
    built_in = {
        builder.layers[name]
        for name in builder.layers
        if builder.layers.provenance(name).package == "lm-workbench"
    }
    assert built_in == tested


@pytest.mark.parametrize("name", ["attention", "mamba", "mamba2", "bitlinear_mamba"])
def test_glyphs_differ(builder: Builder, name: str) -> None:
    """A pattern such as `M-A-` must say which layer is where."""
    glyph = builder.layers[name].glyph
    assert [other for other in builder.layers if builder.layers[other].glyph == glyph] == [name]
