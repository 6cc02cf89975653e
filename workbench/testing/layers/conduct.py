"""How a layer behaves: it says what it returns, changes nothing that is not its own, is quiet."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from torch import Tensor

from workbench.guard import Guard
from workbench.layer import PLAIN, Context
from workbench.testing.advice import concerns
from workbench.testing.layers.base import LayerSuite, assert_close, run_steps


class ConductTests(LayerSuite):
    """Tests of shapes, numbers, side effects and independence of the rows of a batch."""

    @concerns("forward", "step")
    @torch.no_grad()
    def test_shapes_and_numbers(self, config: Any) -> None:
        """Outputs have the shape of the inputs and hold neither NaN nor infinity.

        Mend: Return `[batch, length, d_model]` from `forward` and `[batch, d_model]` from `step`,
        and guard what overflows or divides: inputs of ten standard deviations do come.
        """
        layer = self.build(config)
        for batch_size, length, scale in ((1, 1, 1.0), (3, 7, 1.0), (2, 7, 10.0)):
            x_BTD = scale * self.inputs(batch_size, length)
            state = self.state(layer, batch_size, length + 1)
            where = f"for inputs of {scale:g} σ"
            _assert_sound(layer(x_BTD), x_BTD, "forward", where)
            _assert_sound(layer(x_BTD, PLAIN, state), x_BTD, "forward with a state", where)
            _assert_sound(layer.step(x_BTD[:, 0], state), x_BTD[:, 0], "step", where)

    @concerns("forward", "step")
    @torch.no_grad()
    def test_inputs_are_left_alone(self, config: Any) -> None:
        """Neither the inputs nor the context are changed in place: the residual needs them.

        Mend: Write `x = x * scale` for `x *= scale`, and copy before assigning to slices.
        """
        layer = self.build(config)
        x_BTD = self.inputs(2, 7)
        context = Context(
            attention_mask_BT=torch.tensor([[False] * 2 + [True] * 5, [True] * 7]),
            seq_idx_BT=torch.tensor([[0] * 7, [0] * 3 + [1] * 4], dtype=torch.int32),
        )
        given = {"x": x_BTD, "attention_mask_BT": context.attention_mask_BT}
        given["seq_idx_BT"] = context.seq_idx_BT
        before = {name: tensor.clone() for name, tensor in given.items() if tensor is not None}
        state = self.state(layer, 2, 9)
        layer(x_BTD)
        layer(x_BTD, context)
        layer(x_BTD, PLAIN, state)
        layer.step(x_BTD[:, 0], state)
        for name, tensor in before.items():
            assert torch.equal(given[name], tensor), f"{name} was changed in place"  # type: ignore[arg-type]

    @concerns("forward", "step")
    @torch.no_grad()
    def test_rows_of_a_batch_are_strangers(self, config: Any) -> None:
        """A row's outputs are those it has alone, whatever stands in the other rows.

        Mend: Look for a sum, mean or norm over dim 0, for `view` or `flatten` that mixes batch and
        length, and for a state that all rows share.
        """
        layer, length = self.build(config), 7
        x_BTD = self.inputs(3, length)
        x_BTD[1] *= 5.0
        whole_BTD = layer(x_BTD)
        steps_BTD = run_steps(layer, x_BTD, self.state(layer, 3, length))
        for row in range(3):
            alone_BTD = layer(x_BTD[row : row + 1])
            what = f"row {row} of a batch against that row alone"
            assert_close(whole_BTD[row], alone_BTD[0], self.tolerance, what)
            assert_close(steps_BTD[row], alone_BTD[0], self.tolerance, f"{what}, in steps")

    @concerns("forward", "step", "__init__", "init_state")
    def test_prints_nothing(self, config: Any) -> None:
        """Standard output belongs to the command's results.

        Mend: Remove the `print`; warn with `warnings.warn`, log with `logging`.
        """
        with contextlib.redirect_stdout(io.StringIO()) as said:
            self._run(config)
        assert not said.getvalue(), f"the layer printed {said.getvalue()!r:.80}"

    @concerns("forward", "__init__", "reset_parameters", "step")
    def test_leaves_torch_alone(self, config: Any) -> None:
        """What all plugins share is as it was: torch's functions, settings and random numbers.

        Mend: Assign to nothing of torch's, in your module or in the layer; set no global; draw
        random numbers in `reset_parameters` only.
        """
        guard = Guard()
        try:
            self._run(config)
            layer, before = self.build(config), torch.get_rng_state()
            layer(self.inputs(1, 3))
            drew = not torch.equal(torch.get_rng_state(), before)
        finally:
            changes = guard.restore()
        assert not changes, "; ".join(filter(None, (changes[0].what, changes[0].where)))
        assert not drew, "torch's global generator moved, and not for training"

    def _run(self, config: Any) -> None:
        """Everything that a trial does with a layer."""
        layer = self.build(config)
        x_BTD = self.inputs(2, 5).requires_grad_()
        layer.train()(x_BTD).sum().backward()
        layer.eval()
        with torch.no_grad():
            state = self.state(layer, 2, 6)
            layer(x_BTD, PLAIN, state)
            layer.step(x_BTD[:, 0], state)
        self.layer.check(self.d_model, config)
        self.layer.costs(self.d_model, config, length=7)


def _assert_sound(actual: Any, inputs: Tensor, what: str, where: str) -> None:
    assert isinstance(actual, Tensor), f"{what} returned {type(actual).__name__}, no tensor"
    assert actual.shape == inputs.shape, (
        f"{what} returned shape {list(actual.shape)} for inputs {list(inputs.shape)}"
    )
    assert not actual.isnan().any(), f"{what} returned NaN {where}"
    assert actual.isfinite().all(), f"{what} returned infinity {where}"
