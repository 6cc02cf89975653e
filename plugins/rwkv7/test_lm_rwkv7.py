"""The workbench's contract suite on RWKV-7's layers."""

from collections.abc import Sequence
from typing import Any

from lm_rwkv7 import RWKV7
from lm_rwkv7_channel_mix import ChannelMix

from workbench.layer import Layer
from workbench.testing import LayerContract

SMALL = {
    "head_dim": 8,
    "decay_low_rank_dim": 4,
    "a_low_rank_dim": 3,
    "v_low_rank_dim": 5,
    "gate_low_rank_dim": 6,
    "chunk_size": 8,
}


class TestRWKV7(LayerContract):
    layer = RWKV7
    captured = True
    configs = (
        RWKV7.Config(head_dim=16),
        RWKV7.Config(**SMALL),
        RWKV7.Config(**SMALL, value_residual=False),
    )


class TestRWKV7AfterTheFirst(LayerContract):
    """A block that takes in the first one's value, not that of the one before it."""

    layer = RWKV7
    captured = True
    configs = (RWKV7.Config(**SMALL),)
    name = "rwkv7"

    def earlier(self, config: Any) -> Sequence[tuple[str, type[Layer], Any]]:
        first = RWKV7.Config(head_dim=16, value_residual=False)
        return [("rwkv7", RWKV7, first), ("rwkv7", RWKV7, config)]


class TestChannelMix(LayerContract):
    layer = ChannelMix
    captured = True
    configs = (ChannelMix.Config(), ChannelMix.Config(intermediate_size=40))
