"""How a layer runs: under autocast, under `torch.compile`, and with the FLOPs that it states."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from workbench.layer import PLAIN, Context, Layer
from workbench.testing.advice import concerns
from workbench.testing.layers.base import LayerSuite, assert_close, run_steps

AUTOCAST_ERROR = 0.05  # a block: norm of the difference to float32, relative; rounding gives 0.01
# FLOPs are counted at a power of two, where no layer pads to whole chunks, and at a context short
# enough that attention kernels which torch cannot count stay the smaller part.
FLOPS_LENGTH, FLOPS_CONTEXT = 64, 32


class ExecutionTests(LayerSuite):
    """Tests of mixed precision, compilation and measured FLOPs."""

    @concerns("forward", "step", "init_state")
    def test_autocast(self, config: Any) -> None:
        """Float32 weights under bfloat16 autocast: near float32, decoding too, gradients float32.

        Mend: A linear returns bfloat16 there while parameters and states stay float32: cast to one
        dtype before `torch.cat`, in-place updates and matmuls of your own, or switch autocast off
        around the recurrence (`torch.autocast(device_type, enabled=False)`) and cast its inputs.
        """
        layer = self.build(config).to(torch.float32)
        x_BTD = self.inputs(2, self.longest).float()
        with torch.no_grad():
            expected_BTD = layer(x_BTD)
        x_BTD.requires_grad_()
        cut = max(1, self.longest // 2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = {"forward": layer(x_BTD)}
            outputs["forward"].float().square().sum().backward()
            with torch.no_grad():
                state = layer.init_state(2, self.longest, device="cpu", dtype=torch.float32)
                prompt_BTD = layer(x_BTD[:, :cut], PLAIN, state)
                decoded = [prompt_BTD.float()]
                if cut < self.longest:
                    decoded.append(run_steps(layer, x_BTD[:, cut:], state).float())
                outputs["prefill and steps"] = torch.cat(decoded, dim=1)
        allowed = AUTOCAST_ERROR * (1 + len(self.earlier(config)))
        for what, actual_BTD in outputs.items():
            difference = (actual_BTD.detach().float() - expected_BTD).norm() / expected_BTD.norm()
            assert difference <= allowed, f"{what} under autocast: off by {difference:.3g}"
        for name, tensor in [("x", x_BTD), *layer.named_parameters()]:
            assert tensor.grad is not None, f"{name} has no gradient under autocast"
            assert tensor.grad.isfinite().all(), f"gradient of {name} under autocast"

    @concerns("forward")
    def test_compiles(self) -> None:
        """`torch.compile` takes forward and backward as one graph, for the first of the configs.

        Mend: Branch on nothing that a tensor holds (`if x.max() > 0`, `.item()`, `.tolist()`,
        `.numpy()`): use `torch.where`; print nothing, and write to no global or cache.
        """
        layer, x_BTD = self.build(self.configs[0]), self.inputs(2, 9)
        context = Context(
            attention_mask_BT=torch.tensor([[False] * 2 + [True] * 7, [True] * 9]),
            seq_idx_BT=torch.tensor([[0] * 9, [0] * 4 + [1] * 5], dtype=torch.int32),
        )
        expected_BTD, expected = _with_gradients(layer, layer, x_BTD, context)
        compiled = _compiled(layer)
        actual_BTD, actual = _in_one_graph(_with_gradients, compiled, layer, x_BTD, context)
        assert_close(actual_BTD, expected_BTD, self.tolerance, "compiled forward")
        for name, gradient in expected.items():
            what = f"gradient of {name}, compiled"
            assert_close(actual[name], gradient, self.tolerance, what)

    @concerns("step", "forward")
    @torch.no_grad()
    def test_compiles_steps(self) -> None:
        """`torch.compile` takes a decode step as one graph, for the first of the configs.

        Mend: Branch on nothing that a tensor holds, keep positions in tensors, and update the
        state in place or by assigning to its fields.
        """
        layer, x_BTD = self.build(self.configs[0]), self.inputs(2, 8)
        states = [self.state(layer, 2, 8) for _ in range(2)]
        for state in states:
            layer(x_BTD[:, :5], PLAIN, state)
        expected_BTD = run_steps(layer, x_BTD[:, 5:], states[0])
        step = _compiled(layer.step)
        for index, x_BD in enumerate(x_BTD[:, 5:].unbind(1)):
            actual_BD = _in_one_graph(step, x_BD, states[1])
            what = f"compiled step {index} after a prefill"
            assert_close(actual_BD, expected_BTD[:, index], self.tolerance, what)

    @concerns("costs", "forward", "step")
    @torch.no_grad()
    def test_costs_cover_counted_flops(self, config: Any) -> None:
        """Stated FLOPs are at least those that torch counts, and at most `flops_factor` times.

        torch counts matrix products and convolutions; elementwise work and fused attention on a
        CPU it does not see, so that a statement may be above it, but not without bound.

        Mend: Recount `costs()`: 2 a multiply-add, every linear, `forward_flops` for `length` tokens
        and `decode_flops` for one. Work in units that torch cannot count needs a higher
        `flops_factor` in the suite of your tests, with a test of its own that says why.
        """
        layer = self.build(config).to(torch.float32)
        x_BTD = self.inputs(1, FLOPS_LENGTH).float()
        with FlopCounterMode(display=False) as counter:
            layer(x_BTD)
        forward, _ = self._stated_flops(config, FLOPS_LENGTH)
        self._assert_stated("forward_flops", forward, counter.get_total_flops())
        state = layer.init_state(1, FLOPS_CONTEXT + 1, device="cpu", dtype=torch.float32)
        layer(x_BTD[:, :FLOPS_CONTEXT], PLAIN, state)
        with FlopCounterMode(display=False) as counter:
            layer.step(x_BTD[:, FLOPS_CONTEXT], state)
        _, decode = self._stated_flops(config, FLOPS_CONTEXT)
        self._assert_stated("decode_flops", decode, counter.get_total_flops())

    def _stated_flops(self, config: Any, length: int) -> tuple[int, int]:
        """Forward and decode FLOPs of the layer, and of what it is tested together with."""
        blocks = [*self.earlier(config), (self.name, self.layer, config)]
        costs = [layer.costs(self.d_model, each, length=length) for _, layer, each in blocks]
        return sum(c.forward_flops for c in costs), sum(c.decode_flops for c in costs)

    def _assert_stated(self, name: str, stated: int, counted: int) -> None:
        assert stated >= counted, f"{name} says {stated:,}, but torch counts {counted:,}"
        assert counted == 0 or stated <= self.flops_factor * counted, (
            f"{name} says {stated:,}, {stated / counted:.3g} times what torch counts "
            f"({counted:,}); at most {self.flops_factor:g} times is taken for the elementwise rest"
        )


def _compiled(function: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="eager", dynamic=False)


def _in_one_graph(function: Any, *arguments: Any) -> Any:
    """Call; a graph break becomes an AssertionError that names the line which breaks it."""
    from torch._dynamo import config as dynamo
    from torch._dynamo.exc import TorchDynamoException

    try:
        # It instantiates autograd Functions while it traces them, and warns of that itself.
        with (
            warnings.catch_warnings(action="ignore"),
            dynamo.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True),
        ):
            return function(*arguments)
    except TorchDynamoException as error:
        first, _, _ = str(error).partition("\n")
        raise AssertionError(f"torch.compile breaks the graph: {first}") from error


def _with_gradients(
    function: Any, layer: Layer, x_BTD: Tensor, context: Context
) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs, and the gradient of their sum of squares at the inputs and every parameter."""
    x_BTD = x_BTD.clone().requires_grad_()
    y_BTD = function(x_BTD, context)
    tensors = {"x": x_BTD, **dict(layer.named_parameters())}
    gradients = torch.autograd.grad(y_BTD.square().sum(), list(tensors.values()), allow_unused=True)
    kept = zip(tensors, gradients, strict=True)
    return y_BTD.detach(), {name: gradient for name, gradient in kept if gradient is not None}
