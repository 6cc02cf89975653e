"""The workbench's contract suites on the layers and presets of this package."""

from pathlib import Path

from lm_falcon_h1 import presets
from lm_parallel_hybrid import ParallelHybrid, ScaledSwiGLU

from workbench.builder import Builder
from workbench.layout import Layout
from workbench.testing import LayerContract, PresetContract

Config = ParallelHybrid.Config
SMALL = {"head_dim": 8, "headdim": 8, "d_state": 8, "chunk_size": 8}
MULTIPLIERS = {
    "attention_in_multiplier": 0.7,
    "attention_out_multiplier": 1.3,
    "key_multiplier": 0.6,
    "ssm_in_multiplier": 1.4,
    "ssm_out_multiplier": 0.8,
    "ssm_multipliers": (0.5, 1.5, 0.6, 1.2, 0.9),
}


class TestParallelHybrid(LayerContract):
    layer = ParallelHybrid
    captured = True
    configs = (
        Config(**SMALL),
        Config(**SMALL, attention_share=0.7, n_groups=2, attention_norm=True, sliding_window=5),
        Config(**SMALL, num_kv_heads=1, num_ssm_heads=3, ssm_norm=False, **MULTIPLIERS),
        Config(**SMALL, queries_per_kv=1, position="none", d_conv=2, attention_norm=True),
    )


class TestScaledSwiGLU(LayerContract):
    layer = ScaledSwiGLU
    captured = True
    configs = (
        ScaledSwiGLU.Config(),
        ScaledSwiGLU.Config(gate_multiplier=0.4, down_multiplier=0.1, bias=True),
    )


class TestFalconH1Of1500M(PresetContract):
    preset = presets()["falcon-h1-1.5b"]

    def resolved(self) -> tuple[Builder, Layout]:
        builder = Builder.load([Path(__file__).parent])
        return builder, builder.resolve(self.preset.layout())


class TestFalconH1Of500M(TestFalconH1Of1500M):
    preset = presets()["falcon-h1-0.5b"]
