"""How the layer suite builds, feeds and compares layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from workbench.config import to_dict
from workbench.layer import PLAIN, Context, Layer, State
from workbench.layout import Block, Layout
from workbench.model import HybridLM
from workbench.testing.configs import ConfigContract


class LayerSuite(ConfigContract):
    """What the author sets, and helpers; see `workbench.testing.LayerContract`."""

    under_test = "layer"
    layer: ClassVar[type[Layer]]
    d_model: ClassVar[int] = 32
    lengths: ClassVar[Sequence[int]] = (1, 7, 33)
    tolerance: ClassVar[float] = 1e-9
    float32_tolerance: ClassVar[float] = 1e-4
    straight_through: ClassVar[bool] = False
    flops_factor: ClassVar[float] = 2.0
    captured: ClassVar[bool] = False
    name: ClassVar[str] = "under-test"
    in_model: ClassVar[bool] = False

    def earlier(self, config: Any) -> Sequence[tuple[str, type[Layer], Any]]:
        """Name, class and Config of the blocks before the layer's own, from the input up.

        For a layer that builds on an earlier block (`Layer.source`): the layer is then tested
        together with them, as in a model.
        """
        return ()

    def construct(self, config: Any, **factory: Any) -> Layer:
        """The layer, or a `Stack` of it on what it builds on; not initialised."""
        blocks = [*self.earlier(config), (self.name, self.layer, config)]
        if len(blocks) == 1 and not self.in_model:
            return self.layer(self.d_model, config, **factory)
        return Stack(self.d_model, blocks, **factory)

    def build(self, config: Any, *, seed: int = 0) -> Layer:
        """A layer in float64, initialised as in a model and then disturbed.

        Without the disturbance a bias that starts at zero, or a norm weight that starts at one,
        could be forgotten in `step` and nobody would see.
        """
        layer = self.construct(config, dtype=torch.float64)
        initialise(layer, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in layer.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise.to(parameter.dtype), alpha=0.1)
        return layer.eval()

    def inputs(self, batch_size: int, length: int, *, seed: int = 0) -> Tensor:
        """Normal activations `[B, T, D]` in float64, as they come out of a norm."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch_size, length, self.d_model)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def state(self, layer: Layer, batch_size: int, max_length: int) -> State:
        """An empty state in float64."""
        return layer.init_state(batch_size, max_length, device="cpu", dtype=torch.float64)

    @property
    def longest(self) -> int:
        return max(self.lengths)


@dataclasses.dataclass
class StackState(State):
    """One state a block."""

    blocks: list[State] = dataclasses.field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(state.num_bytes for state in self.blocks)

    def select(self, indices_B: Tensor) -> StackState:
        return StackState([state.select(indices_B) for state in self.blocks])


class Stack(Layer):
    """A model's residual stream as one layer: what is true of a layer must be true of it.

    Attributes:
        model: whose blocks it runs; its embedding and head stay out of it.
    """

    model: HybridLM

    def __init__(
        self, d_model: int, blocks: Sequence[tuple[str, type[Layer], Any]], **factory: Any
    ) -> None:
        super().__init__(d_model, None)
        layout = Layout(
            d_model=d_model,
            vocab_size=1,
            blocks=tuple(Block(layer=name, config=to_dict(config)) for name, _, config in blocks),
        )
        layers = [layer(d_model, config, **factory) for _, layer, config in blocks]
        model = HybridLM(layout, layers, **factory)
        for module in (model.embedding, model.norm_f, model.lm_head):
            module.to_empty(device="meta")  # drawing their weights would move the generator
        object.__setattr__(self, "model", model)
        self.blocks = model.blocks

    def init_state(self, batch_size: int, max_length: int, **factory: Any) -> StackState:
        states = [
            layer.init_state(batch_size, max_length, **factory) for layer in self.model.layers
        ]
        return StackState(states)

    def forward(
        self, x_BTD: Tensor, context: Context = PLAIN, state: StackState | None = None
    ) -> Tensor:
        return self.model.run_blocks(x_BTD, context, None if state is None else state.blocks)

    def step(self, x_BD: Tensor, state: StackState, context: Context = PLAIN) -> Tensor:
        return self.model.step_blocks(x_BD, state.blocks)


def initialise(layer: Layer, *, seed: int) -> None:
    """Give a layer the initial weights it would have as a model's only block.

    Linears are drawn with the standard deviation `d_model ** -0.5` instead of the model's 0.02, so
    that outputs are of order one and a wrong one is visible. The global generator is untouched.
    """
    if isinstance(layer, Stack):
        model = layer.model
    else:
        block = Block(layer="under-test", config=to_dict(layer.config))
        model = HybridLM(Layout(d_model=layer.d_model, vocab_size=1, blocks=(block,)), [layer])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.reset_parameters(std=layer.d_model**-0.5)


@torch.no_grad()
def run_steps(layer: Layer, x_BTD: Tensor, state: State) -> Tensor:
    """`step` on one token after the other: outputs `[B, T, D]`."""
    return torch.stack([layer.step(x_BD, state) for x_BD in x_BTD.unbind(1)], dim=1)


@torch.no_grad()
def run_chunks(layer: Layer, x_BTD: Tensor, state: State, sizes: Sequence[int]) -> Tensor:
    """`forward` on one chunk after the other, the state carried along: outputs `[B, T, D]`."""
    outputs, start = [], 0
    for size in sizes:
        outputs.append(layer(x_BTD[:, start : start + size], PLAIN, state))
        start += size
    return torch.cat(outputs, dim=1)


def run_with_gradient(
    layer: Layer, x_BTD: Tensor, weights_BTD: Tensor, context: Context = PLAIN
) -> tuple[Tensor, Tensor]:
    """Outputs, and the gradient of `(outputs * weights).sum()` at the inputs."""
    x_BTD = x_BTD.clone().requires_grad_()
    y_BTD = layer(x_BTD, context)
    (gradient_BTD,) = torch.autograd.grad((y_BTD * weights_BTD).sum(), x_BTD)
    return y_BTD.detach(), gradient_BTD


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Assert equality within `tolerance`, relative to the largest expected magnitude."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    scale = max(1.0, float(expected.detach().abs().max()))
    difference = float((actual.detach().double() - expected.detach().double()).abs().max())
    # Written so that a NaN fails, too.
    assert difference <= tolerance * scale, f"{what}: off by {difference:.3g}"
