"""QuantizerContract: the tests that any quantizer must pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from workbench.layer import Layer
from workbench.quantizer import Quantizer, num_bytes
from workbench.testing.advice import concerns
from workbench.testing.configs import ConfigContract
from workbench.testing.layers.base import assert_close, initialise
from workbench.testing.toys import ToyMixer


class QuantizerContract(ConfigContract):
    """What searches, records and exports rely on in a quantizer.

        class TestMyQuantizer(QuantizerContract):
            quantizer = MyQuantizer
            configs = [MyQuantizer.Config(), MyQuantizer.Config(group_size=32)]
            max_error = 0.02

    Class attributes:
        quantizer: the class under test.
        configs: Config instances.
        max_error: root mean square of the change of outputs over that of the outputs.
        layer, layer_config, d_model: what is quantized; by default a toy with a bias and a linear
            in its `keep_precision`. Choose another for a quantizer of particular layers.
    """

    under_test = "quantizer"
    quantizer: ClassVar[type[Quantizer]]
    max_error: ClassVar[float] = 0.05
    layer: ClassVar[type[Layer]] = ToyMixer
    layer_config: ClassVar[Any] = ToyMixer.Config(expand=2)
    d_model: ClassVar[int] = 96

    def build(self, *, seed: int = 0) -> Layer:
        """A freshly initialised float32 layer."""
        layer = self.layer(self.d_model, self.layer_config, dtype=torch.float32)
        initialise(layer, seed=seed)
        return layer.eval()

    def inputs(self) -> Tensor:
        """Normal activations `[2, 9, D]`."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(2, 9, self.d_model, generator=generator)

    def test_class_attributes(self) -> None:
        """The reference is set; the configs are instances of `Config`.

        Mend: Set `reference`, and make the suite's configs with the class's own Config.
        """
        assert self.quantizer.reference, "say which paper or format it follows"
        for config in self.configs:
            assert isinstance(config, self.quantizer.Config)

    @concerns("quantize")
    def test_bytes_are_counted_not_estimated(self, config: Any, tmp_path: Path) -> None:
        """Reported bytes are those that the weights take in memory and in a file.

        Mend: Report for each linear the bytes of the tensors that now hold its weights, scales
        included, biases not; hold them as buffers or parameters, packed, and fewer than before.
        """
        layer = self.build()
        before = {name: module.weight.nbytes for name, module in _linears(layer)}
        report = self.quantizer.quantize(layer, config)
        for name, stored in report.quantized.items():
            module = layer.get_submodule(name)
            bias = getattr(module, "bias", None)
            assert stored == num_bytes(module) - (0 if bias is None else bias.nbytes), name
            assert stored < before[name], f"{name} takes no fewer bytes than before"
        path = tmp_path / "layer.safetensors"
        save_file(_contiguous(layer), path)
        with safe_open(path, framework="pt") as file:
            in_file = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
        assert in_file == num_bytes(layer)

    @concerns("quantize")
    def test_meta_device_counts_the_same(self, config: Any) -> None:
        """On the meta device: the same report and the same bytes.

        Mend: Make every new tensor on the device of the weight it replaces, and read no values
        where that device is meta.
        """
        layer = self.build()
        meta = self.layer(self.d_model, self.layer_config, device="meta", dtype=torch.float32)
        assert self.quantizer.quantize(meta, config) == self.quantizer.quantize(layer, config)
        assert num_bytes(meta) == num_bytes(layer)
        for name, tensor in [*meta.named_parameters(), *meta.named_buffers()]:
            assert tensor.device.type == "meta", name

    @concerns("quantize")
    @torch.no_grad()
    def test_outputs_stay_close(self, config: Any) -> None:
        """The layer still computes nearly what it did, in the same dtype.

        Mend: Check scales, rounding and packing; compute in the dtype of the inputs. If the format
        itself loses more, set `max_error` in the suite of your tests.
        """
        layer, x_BTD = self.build(), self.inputs()
        before_BTD = layer(x_BTD)
        self.quantizer.quantize(layer, config)
        after_BTD = layer(x_BTD)
        assert after_BTD.dtype == before_BTD.dtype
        error = float((after_BTD - before_BTD).square().mean().sqrt())
        scale = float(before_BTD.square().mean().sqrt())
        assert error <= self.max_error * scale, f"relative error {error / scale:.3g}"
        state = layer.init_state(2, 9, device="cpu", dtype=torch.float32)
        steps_BTD = torch.stack([layer.step(x_BD, state) for x_BD in x_BTD.unbind(1)], dim=1)
        assert_close(steps_BTD, after_BTD, 1e-4, "steps against forward, quantized")

    @concerns("quantize")
    def test_every_linear_is_accounted_for(self, config: Any) -> None:
        """Each linear is quantized or kept with a reason; `keep_precision` is kept to the bit.

        Mend: List every linear of the layer under `quantized`, or under `kept` with the reason;
        leave those in `layer.keep_precision`, and what lies inside them, alone.
        """
        layer, untouched = self.build(), self.build()
        report = self.quantizer.quantize(layer, config)
        assert not set(report.quantized) & set(report.kept)
        for name, module in _linears(untouched):
            protected = any(
                name == kept or name.startswith(f"{kept}.") for kept in layer.keep_precision
            )
            assert name in report.quantized or name in report.kept, f"{name} is not reported"
            assert not (protected and name in report.quantized), f"{name} is in keep_precision"
            if name in report.kept:
                assert report.kept[name], f"say why {name} was kept"
                weight = layer.get_submodule(name).weight
                assert isinstance(weight, Tensor)
                assert torch.equal(weight, module.weight), f"{name} was kept, but it changed"

    @concerns("quantize")
    @torch.no_grad()
    def test_is_idempotent(self, config: Any) -> None:
        """Quantizing again changes nothing, and reports the same.

        Mend: Recognise your own modules and leave them as they are, but report them again.
        """
        layer, x_BTD = self.build(), self.inputs()
        report = self.quantizer.quantize(layer, config)
        stored, expected_BTD = num_bytes(layer), layer(x_BTD)
        assert self.quantizer.quantize(layer, config) == report, "the second report differs"
        assert num_bytes(layer) == stored
        assert torch.equal(layer(x_BTD), expected_BTD)

    @concerns("quantize")
    @torch.no_grad()
    def test_save_and_load(self, config: Any, tmp_path: Path) -> None:
        """Stored weights survive safetensors: a quantized layer that loads them is the same.

        Mend: Hold the stored weights and scales as persistent buffers or parameters of the new
        module, so that its state dict is complete.
        """
        layer, other = self.build(), self.build(seed=1)
        for each in (layer, other):
            self.quantizer.quantize(each, config)
        x_BTD = self.inputs()
        assert not torch.equal(other(x_BTD), layer(x_BTD)), "seeds give the same weights"
        save_file(_contiguous(layer), tmp_path / "layer.safetensors")
        other.load_state_dict(load_file(tmp_path / "layer.safetensors"), strict=True)
        assert torch.equal(other(x_BTD), layer(x_BTD))


def _linears(layer: Layer) -> list[tuple[str, nn.Linear]]:
    return [(name, m) for name, m in layer.named_modules() if isinstance(m, nn.Linear)]


def _contiguous(layer: Layer) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in layer.state_dict().items()}
