"""The built-in placements, quantizers, metrics and data sources keep the contracts, too.

Layers have a file of their own. `stdlib` and `hub` are `text` over other files: see test_data.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from workbench.builder import Builder
from workbench.testing import (
    DataSourceContract,
    MetricContract,
    PlacementContract,
    QuantizerContract,
)
from workbench.testing.configs import ConfigContract
from workbench_data.mqar import MultiQueryRecall
from workbench_data.text import TextFiles
from workbench_metrics import quality, speed, static
from workbench_placement import explicit, mixed
from workbench_quantizers.groupwise import Int4, Int8
from workbench_quantizers.ternary import B158

TWO = {"majority": "mamba", "minority": "attention"}


class TestPeriodic(PlacementContract):
    placement = mixed.Periodic
    configs = (placement.Config(**TWO), placement.Config(**TWO, period=3, offset=0))


class TestEvenlySpaced(PlacementContract):
    placement = mixed.EvenlySpaced
    configs = (placement.Config(**TWO), placement.Config(**TWO, count=4))


class TestPrefixSuffix(PlacementContract):
    placement = mixed.PrefixSuffix
    configs = (placement.Config(**TWO),)


class TestStrategic(PlacementContract):
    placement = mixed.Strategic
    configs = (placement.Config(**TWO),)


class TestSandwich(PlacementContract):
    placement = mixed.Sandwich
    configs = (placement.Config(**TWO),)


class TestUniform(PlacementContract):
    placement = explicit.Uniform
    configs = (placement.Config(mixer="mamba"),)


class TestPattern(PlacementContract):
    placement = explicit.Pattern
    configs = (placement.Config(pattern="3*mamba, attention"),)


class TestFree(PlacementContract):
    placement = explicit.Free
    configs = (placement.Config(mixers=("mamba", "attention", "mamba")),)


class TestInt8(QuantizerContract):
    quantizer = Int8
    configs = (Int8.Config(), Int8.Config(group_size=32))
    max_error = 0.02


class TestInt4(QuantizerContract):
    quantizer = Int4
    configs = (Int4.Config(), Int4.Config(group_size=32))
    max_error = 0.2


class TestB158(QuantizerContract):
    """Ternary weights of an untrained layer keep little more than the direction of its outputs."""

    quantizer = B158
    configs = (B158.Config(),)
    max_error = 0.8


METRICS = [
    static.Parameters,
    static.ActiveParameters,
    static.WeightBytes,
    static.StateBytes,
    static.MemoryBytes,
    static.ForwardFlops,
    static.DecodeFlops,
    speed.DecodeMilliseconds,
    speed.PrefillMilliseconds,
    speed.TokensPerSecond,
    speed.TimeToFirstToken,
    speed.TimePerOutputToken,
    speed.GenerationTokensPerSecond,
    quality.BitsPerByteUnquantized,
    quality.BitsPerByte,
    quality.Perplexity,
    quality.Accuracy,
]
for _metric in METRICS:
    _name = f"Test{_metric.__name__}"
    _suite = type(_name, (MetricContract,), {"metric": _metric, "configs": (_metric.Config(),)})
    globals()[_name] = _suite


class TestMultiQueryRecall(DataSourceContract):
    source = MultiQueryRecall
    configs = (MultiQueryRecall.Config(validation_examples=16),)


class TestTextFiles(DataSourceContract):
    source = TextFiles
    configs = (TextFiles.Config(paths=("*.txt",), validation_share=0.3),)

    @pytest.fixture(autouse=True)
    def corpus(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        """Forty short files with no two lines alike."""
        self.folder = tmp_path_factory.getbasetemp() / "corpus"
        if not self.folder.exists():
            self.folder.mkdir()
            dice = random.Random(0)
            for number in range(40):
                lines = (f"{dice.random()} {dice.choice('äöü')}\n" for _ in range(30))
                text = "".join(lines)
                (self.folder / f"{number}.txt").write_text(text, encoding="utf-8")

    def make(self, config, folder: Path, *, seed: int = 0):
        paths = tuple(str(self.folder / path) for path in config.paths)
        return super().make(dataclasses.replace(config, paths=paths), folder, seed=seed)


# They refuse where there is no latency table or no CUDA device, or train for seconds: their own
# tests give them what they need.
ELSEWHERE = {"peak_memory_bytes", "predicted_decode_ms", "predicted_prefill_ms", "mqar_recall"}


@pytest.mark.parametrize(
    ("kind", "base", "attribute", "elsewhere"),
    [
        ("placements", PlacementContract, "placement", set()),
        ("quantizers", QuantizerContract, "quantizer", set()),
        ("metrics", MetricContract, "metric", ELSEWHERE),
        ("data_sources", DataSourceContract, "source", {"stdlib", "hub"}),
    ],
)
def test_no_built_in_thing_is_left_out(
    builder: Builder, kind: str, base: type[ConfigContract], attribute: str, elsewhere: set[str]
) -> None:
    """What joins the built-in things must join this file."""
    suites = [suite for suite in base.__subclasses__() if suite.__module__ == __name__]
    tested = {getattr(suite, attribute) for suite in suites}
    registry = builder.registries()[kind]
    built_in = {
        registry[name]
        for name in registry
        if registry.provenance(name).package == "lm-workbench" and name not in elsewhere
    }
    assert built_in == tested
