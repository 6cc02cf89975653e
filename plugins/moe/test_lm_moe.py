"""The workbench's contract suite on the layer of this package, in every branch of its Config."""

from lm_moe import MixtureOfExperts

from workbench.testing import LayerContract

SMALL = {"num_experts": 4, "intermediate_size": 24}


class TestMixtureOfExperts(LayerContract):
    layer = MixtureOfExperts
    configs = (
        MixtureOfExperts.Config(),
        MixtureOfExperts.Config(**SMALL, top_k=1, router="softmax", shared_expand=0.5),
        MixtureOfExperts.Config(**SMALL, top_k=3, router="topk_softmax"),
        MixtureOfExperts.Config(
            **SMALL, shared_intermediate_size=20, shared_gate=True, z_loss_weight=1e-3
        ),
    )
