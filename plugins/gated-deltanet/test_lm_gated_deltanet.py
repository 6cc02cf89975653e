"""The workbench's contract suite on Gated DeltaNet."""

from lm_gated_deltanet import GatedDeltaNet

from workbench.testing import LayerContract

SMALL = {"num_k_heads": 2, "head_k_dim": 8, "head_v_dim": 12, "chunk_size": 8}


class TestGatedDeltaNet(LayerContract):
    layer = GatedDeltaNet
    captured = True
    configs = (
        GatedDeltaNet.Config(),
        GatedDeltaNet.Config(**SMALL, num_v_heads=4, allow_neg_eigval=True),
        GatedDeltaNet.Config(**SMALL, use_gate=False, d_conv=2),
    )
