"""What a layer does in training: right gradients, other precisions, the same result every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from workbench.layer import PLAIN, Layer
from workbench.testing.advice import concerns
from workbench.testing.layers.base import LayerSuite, assert_close, initialise, run_steps

STEP = 1e-6  # of finite differences: in float64 neither rounding nor curvature shows


class TrainingTests(LayerSuite):
    """Tests of gradients, precisions, initialisation and weights on disk."""

    @concerns("forward")
    def test_gradients(self, config: Any) -> None:
        """Every parameter has a finite gradient, and all agree with finite differences.

        Mend: Look for `detach`, `.data`, `no_grad`, or a parameter that `forward` never uses; in an
        autograd Function, for a wrong `backward`. If a straight-through estimator is meant, set
        `straight_through = True` in the suite of your tests.
        """
        layer = self.build(config)
        x_BTD = self.inputs(2, self.longest).requires_grad_()
        layer(x_BTD).square().sum().backward()
        gradients = {"x": x_BTD.grad, **{n: p.grad for n, p in layer.named_parameters()}}
        for name, gradient in gradients.items():
            assert gradient is not None, f"{name} has no gradient"
            assert gradient.isfinite().all(), f"gradient of {name}"
        if not self.straight_through:
            self._assert_finite_differences(layer)

    def _assert_finite_differences(self, layer: Layer) -> None:
        x_BTD = self.inputs(1, self.longest)
        weights_BTD = self.inputs(1, self.longest, seed=1)
        tensors = {"x": x_BTD.requires_grad_(), **dict(layer.named_parameters())}
        loss = (layer(x_BTD) * weights_BTD).sum()
        gradients = torch.autograd.grad(loss, list(tensors.values()))
        generator = torch.Generator().manual_seed(2)
        for (name, tensor), gradient in zip(tensors.items(), gradients, strict=True):
            direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

            def loss_at(distance: float, tensor: Tensor = tensor, way: Tensor = direction) -> float:
                with torch.no_grad():
                    before = tensor.clone()
                    tensor.add_(way, alpha=distance)
                    value = float((layer(x_BTD) * weights_BTD).sum())
                    tensor.copy_(before)
                return value

            numeric = (loss_at(STEP) - loss_at(-STEP)) / (2 * STEP)
            analytic = float((gradient * direction).sum())
            allowed = 1e-5 * float(gradient.norm()) + 1e-8 * max(1.0, abs(float(loss.detach())))
            assert abs(numeric - analytic) <= allowed, (
                f"gradient of {name}: {analytic:.9g} along a direction in which "
                f"finite differences give {numeric:.9g}"
            )

    @concerns("forward", "step")
    @torch.no_grad()
    def test_float32(self, config: Any) -> None:
        """Forward, and prefill with steps, in float32 stay near float64.

        Mend: Round to nothing narrower than the inputs' dtype, and sum long products in float32.
        """
        layer, length = self.build(config), self.longest
        x_BTD = self.inputs(2, length)
        expected_BTD = layer(x_BTD)
        layer.to(torch.float32)
        state = layer.init_state(2, length, dtype=torch.float32)
        x_BTD = x_BTD.float()
        cut = max(1, length // 2)
        decoded_BTD = torch.cat(
            [layer(x_BTD[:, :cut], PLAIN, state), run_steps(layer, x_BTD[:, cut:], state)]
            if cut < length
            else [layer(x_BTD, PLAIN, state)],
            dim=1,
        )
        for actual_BTD, what in ((layer(x_BTD), "forward"), (decoded_BTD, "decoding")):
            assert actual_BTD.dtype == torch.float32
            assert_close(actual_BTD, expected_BTD, self.float32_tolerance, f"{what} in float32")

    @concerns("forward", "step", "init_state")
    def test_bfloat16(self, config: Any) -> None:
        """In bfloat16 outputs, steps and gradients are bfloat16 and finite.

        Mend: Make every tensor with the inputs' dtype and device (`x.new_zeros`, `torch.zeros(...,
        dtype=x.dtype)`), cast constants, and give the output back in the inputs' dtype.
        """
        layer = self.build(config).to(torch.bfloat16)
        x_BTD = self.inputs(2, 7).bfloat16().requires_grad_()
        state = layer.init_state(2, 9, dtype=torch.bfloat16)
        y_BTD = layer(x_BTD)
        y_BTD.float().sum().backward()
        with torch.no_grad():
            prefilled_BTD = layer(x_BTD, PLAIN, state)
        steps_BTD = run_steps(layer, self.inputs(2, 2).bfloat16(), state)
        assert x_BTD.grad is not None
        tensors = {"forward": y_BTD, "prefill": prefilled_BTD, "steps": steps_BTD, "x": x_BTD.grad}
        for name, tensor in tensors.items():
            assert tensor.dtype == torch.bfloat16, f"{name} is {tensor.dtype}"
            assert tensor.isfinite().all(), f"{name} in bfloat16"

    @concerns("forward", "reset_parameters")
    def test_determinism(self, config: Any) -> None:
        """Same seed, same weights; same weights, the same bits of outputs and gradients.

        Mend: Draw nothing at random outside `reset_parameters` (dropout is off in eval), and keep
        nothing from call to call but in the state.
        """
        runs = []
        for _ in range(2):
            layer = self.build(config)
            y_BTD = layer(self.inputs(2, self.longest))
            y_BTD.square().sum().backward()
            gradients = [p.grad for p in layer.parameters() if p.grad is not None]
            runs.append([*layer.parameters(), y_BTD, *gradients])
        for first, second in zip(*runs, strict=True):
            assert torch.equal(first, second)

    @concerns("__init__", "reset_parameters", "forward")
    @torch.no_grad()
    def test_save_and_load(self, config: Any, tmp_path: Path) -> None:
        """Weights survive safetensors: a layer that loads them gives the same bits.

        Mend: Register whatever is drawn or learned as a parameter or a persistent buffer; a
        non-persistent buffer is computed from the config alone, in `forward`.
        """
        layer, other = self.build(config), self.build(config, seed=1)
        x_BTD = self.inputs(2, 7)
        expected_BTD = layer(x_BTD)
        if layer.state_dict():
            assert not torch.equal(other(x_BTD), expected_BTD), "seeds give the same weights"
        save_file(layer.state_dict(), tmp_path / "layer.safetensors")
        other.load_state_dict(load_file(tmp_path / "layer.safetensors"), strict=True)
        assert torch.equal(other(x_BTD), expected_BTD)

    @concerns("reset_parameters", "__init__", "forward")
    @torch.no_grad()
    def test_reset_parameters_needs_no_constructor(self, config: Any) -> None:
        """`reset_parameters` fills everything: meta device, `to_empty`, reset equals a build.

        Mend: Only allocate in the constructor, and set every parameter and buffer that is no plain
        linear's in `reset_parameters`.
        """
        built = self.construct(config, dtype=torch.float64)
        initialise(built, seed=3)
        emptied = self.construct(config, device="meta", dtype=torch.float64)
        emptied = emptied.to_empty(device="cpu")
        for tensor in [*emptied.parameters(), *emptied.buffers()]:
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))  # what uninitialised memory may hold
        initialise(emptied, seed=3)
        for name, parameter in built.named_parameters():
            assert torch.equal(emptied.get_parameter(name), parameter), f"{name} after to_empty"
        x_BTD = self.inputs(1, 7)
        assert torch.equal(emptied(x_BTD), built(x_BTD)), "outputs after to_empty"

    @concerns("output_projection")
    def test_output_projection(self) -> None:
        """`output_projection`, if any, names a submodule with a weight in every configuration.

        Mend: Set `output_projection` to the name of the linear that writes to the residual stream,
        or to None.
        """
        name = self.layer.output_projection
        for config in self.configs:
            layer = self.layer(self.d_model, config, device="meta")
            assert name is None or isinstance(layer.get_submodule(name).weight, Tensor)
