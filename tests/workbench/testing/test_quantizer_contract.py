"""QuantizerContract passes on an honest quantizer, and each of its tests finds its fault."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.workbench.testing.running import failure, suite_tests
from workbench.config import NoConfig
from workbench.quantizer import QuantizationReport, Quantizer
from workbench.testing import QuantizerContract


class Int8Linear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("integers", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = linear.bias

    @property
    def weight_bytes(self):
        return self.integers.nbytes + self.scale.nbytes

    def forward(self, x):
        return F.linear(x, self.integers * self.scale, self.bias)


class RowInt8(Quantizer):
    reference = "tests"
    stored = Int8Linear

    @classmethod
    def keeps(cls, layer, name):
        return layer.keep_precision.get(name)

    @classmethod
    def quantize(cls, layer, config):
        quantized, kept = {}, {}
        for name, module in list(layer.named_modules()):
            if (reason := cls.keeps(layer, name)) is not None:
                kept[name] = reason
            elif isinstance(module, nn.Linear):
                stored = cls.stored(module)
                layer.set_submodule(name, stored)
                quantized[name] = stored.weight_bytes
            elif isinstance(module, cls.stored):
                quantized[name] = module.weight_bytes
        return QuantizationReport(quantized=quantized, kept=kept)


class TestRowInt8(QuantizerContract):
    quantizer = RowInt8
    configs = (NoConfig(),)
    max_error = 0.02


def storing(stored):
    """RowInt8 with other modules."""
    return type(stored.__name__, (RowInt8,), {"stored": stored})


class ForgetsTheScale(Int8Linear):
    @property
    def weight_bytes(self):
        return self.integers.nbytes


class StoresFloats(Int8Linear):
    """A fake quantizer: counts bits that nothing is stored in."""

    def __init__(self, linear):
        super().__init__(linear)
        self.integers = self.integers.float()

    @property
    def weight_bytes(self):
        return self.integers.numel() + self.scale.nbytes


class KeepsAsManyBytes(StoresFloats):
    @property
    def weight_bytes(self):
        return self.integers.nbytes + self.scale.nbytes


class ReadsValues(Int8Linear):
    def __init__(self, linear):
        if linear.weight.is_meta:
            linear = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        super().__init__(linear)


class Coarse(Int8Linear):
    def forward(self, x):
        return F.linear(x, (self.integers // 32 * 32) * self.scale, self.bias)


class Widens(Int8Linear):
    def forward(self, x):
        y = super().forward(x)
        return y.double() if x.shape[-1] > y.shape[-1] else y  # out_proj


class HidesItsScale(Int8Linear):
    def __init__(self, linear):
        super().__init__(linear)
        scale = self.scale
        del self.scale
        self.register_buffer("scale", scale, persistent=False)


class TakesAll(RowInt8):
    @classmethod
    def keeps(cls, layer, name):
        return None


class SaysNothing(RowInt8):
    @classmethod
    def quantize(cls, layer, config):
        report = super().quantize(layer, config)
        return dataclasses.replace(report, kept={})


class GivesNoReason(RowInt8):
    @classmethod
    def keeps(cls, layer, name):
        return "" if name in layer.keep_precision else None


class RoundsWhatItKeeps(RowInt8):
    @classmethod
    @torch.no_grad()
    def quantize(cls, layer, config):
        layer.gate_proj.weight.copy_(layer.gate_proj.weight.bfloat16())
        return super().quantize(layer, config)


class Again(RowInt8):
    """Quantizes its own scales when it is called twice."""

    @classmethod
    def quantize(cls, layer, config):
        for module in layer.modules():
            if isinstance(module, Int8Linear):
                module.scale = module.scale.bfloat16().float()
        return super().quantize(layer, config)


class NoSource(RowInt8):
    reference = ""


class InfiniteClip(RowInt8):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        clip: float = math.inf


FAULTS: list[tuple[type[Quantizer], str]] = [
    (storing(ForgetsTheScale), "test_bytes_are_counted_not_estimated"),
    (storing(StoresFloats), "test_bytes_are_counted_not_estimated"),
    (storing(KeepsAsManyBytes), "test_bytes_are_counted_not_estimated"),
    (storing(HidesItsScale), "test_bytes_are_counted_not_estimated"),
    (storing(ReadsValues), "test_meta_device_counts_the_same"),
    (storing(Coarse), "test_outputs_stay_close"),
    (storing(Widens), "test_outputs_stay_close"),
    (storing(HidesItsScale), "test_save_and_load"),
    (TakesAll, "test_every_linear_is_accounted_for"),
    (SaysNothing, "test_every_linear_is_accounted_for"),
    (GivesNoReason, "test_every_linear_is_accounted_for"),
    (RoundsWhatItKeeps, "test_every_linear_is_accounted_for"),
    (Again, "test_is_idempotent"),
    (NoSource, "test_class_attributes"),
    (InfiniteClip, "test_config_is_plain_data"),
]

RAISES = {"test_config_is_plain_data": "ValueError"}


@pytest.mark.parametrize(
    ("quantizer", "test"), FAULTS, ids=[f"{thing.__name__}-{test[5:]}" for thing, test in FAULTS]
)
def test_each_fault_is_found(quantizer: type[Quantizer], test: str, tmp_path: Path) -> None:
    message = failure(
        QuantizerContract, test, tmp_path, quantizer=quantizer, configs=(quantizer.Config(),)
    )
    assert message.startswith(RAISES.get(test, "AssertionError"))


def test_every_test_of_the_suite_has_a_fault() -> None:
    assert suite_tests(QuantizerContract) == {test for _, test in FAULTS}
