"""What a layer promises for CUDA devices, as far as a CPU can tell: static steps, and backends.

Shape suffixes: B batch, T tokens, D d_model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from workbench.decoding import Places, why_not_static
from workbench.kernels import TORCH, operations
from workbench.layer import Context, Layer, State
from workbench.model import HybridLM
from workbench.testing.advice import concerns
from workbench.testing.layers.base import LayerSuite, Stack, StackState, assert_close, run_steps

PROMPTS, STEPS = (3, 12), 10  # within a short window, and beyond


class DeviceTests(LayerSuite):
    """Tests of what a layer says of itself for CUDA graphs and kernels."""

    @concerns("step", "init_state")
    @torch.no_grad()
    def test_static_steps_are_steps(self, config: Any) -> None:
        """Steps of a state made static are those of a plain one, and again after `restore`.

        As a CUDA graph replays them: what a step changes is tensors alone, at fixed places. Where
        the layer says that its steps cannot be captured, or that is found, this is skipped, and
        fails if the suite says `captured`.

        Mend: After `make_static` a step must count and mask by tensors `[batch]`: a number that
        stands still is read there, perhaps. `make_static` takes every number's value over, and
        `restore` puts back all that a step changes. A state with tensors alone needs neither.
        """
        layer = self.build(config)
        for prompt in PROMPTS:
            x_BTD = self.inputs(2, prompt + STEPS)
            padded_BT = torch.ones(2, prompt, dtype=torch.bool)
            padded_BT[1, 0] = False
            for mask_BT in (None, padded_BT):
                state = self.state(layer, 2, prompt + STEPS)
                layer(x_BTD[:, :prompt], Context(attention_mask_BT=mask_BT), state)
                reason = why_not_static(_model(layer, x_BTD[:, 0]), _parts(state))
                if reason:
                    assert not self.captured, f"steps cannot be captured: {reason}"
                    pytest.skip(reason)
                self._assert_static(layer, x_BTD[:, prompt:], state)

    def _assert_static(self, layer: Layer, x_BTD: Tensor, state: State) -> None:
        static, before = copy.deepcopy(state), copy.deepcopy(state)
        for part in _parts(static):
            part.make_static()
        places = Places(_parts(static))
        expected_BTD = run_steps(layer, x_BTD, state)
        for when in ("", " after `restore`"):
            for index, x_BD in enumerate(x_BTD.unbind(1)):
                actual_BD = layer.step(x_BD, static)
                places.take_back()
                what = f"static step {index}{when}"
                assert_close(actual_BD, expected_BTD[:, index], self.tolerance, what)
            for part, earlier in zip(_parts(static), _parts(before), strict=True):
                part.restore(earlier)

    @concerns("backends")
    def test_backends_are_known(self, config: Any) -> None:
        """`backends` names defined operations, inner layers' too; on a CPU all run on torch.

        Mend: Give each operation the name of its `workbench.kernels.Operation`, and what its
        `choose` returns for the device of the weights: `torch` on a CPU. A layer made of layers
        adds theirs: `super().backends(dtype) | self.inner.backends(dtype)`.
        """
        layer = self.build(config)
        known = operations()
        for part in layer.model.layers if isinstance(layer, Stack) else (layer,):
            for dtype in (torch.float32, torch.bfloat16):
                found = part.backends(dtype)
                assert isinstance(found, dict), f"backends({dtype}) returned {found!r}, no dict"
                for operation, backend in found.items():
                    where = f"backends({dtype}) names the operation {operation!r}"
                    assert operation in known, f"{where}, which nobody defines"
                    assert backend == TORCH, f"{where} with {backend!r}, on a CPU"
                for name, inner in part.named_modules():
                    if isinstance(inner, Layer):
                        missing = sorted(inner.backends(dtype).keys() - found.keys())
                        assert not missing, f"backends({dtype}) leaves out {missing} of {name}"


def _parts(state: State) -> Sequence[State]:
    """The states as a model holds them: one a block."""
    return state.blocks if isinstance(state, StackState) else [state]


class _Steps:
    """As much of a model as `why_not_static` asks: its layers, their device, and a step."""

    def __init__(self, layer: Layer, x_BD: Tensor) -> None:
        self.layers = layer.model.layers if isinstance(layer, Stack) else [layer]
        self.device = x_BD.device
        self._layer, self._x_BD = layer, x_BD

    def step(self, tokens_B: Tensor, states: list[State]) -> Tensor:
        state = StackState(states) if isinstance(self._layer, Stack) else states[0]
        return self._layer.step(self._x_BD, state)


def _model(layer: Layer, x_BD: Tensor) -> HybridLM:
    return cast(HybridLM, _Steps(layer, x_BD))
