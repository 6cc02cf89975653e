"""What a layer computes: causal, the same in every mode, and blind to what it must not see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.layer import PLAIN, Context
from workbench.testing.advice import concerns
from workbench.testing.layers.base import (
    LayerSuite,
    assert_close,
    run_chunks,
    run_steps,
    run_with_gradient,
)


class OutputTests(LayerSuite):
    """Tests of `forward`, `step` and the Context."""

    @concerns("forward")
    @torch.no_grad()
    def test_causality(self, config: Any) -> None:
        """A token changes its own output and later ones, never an earlier one.

        Mend: Look for what reaches across tokens in `forward`: a mean or norm over dim 1, a
        convolution padded on the right, attention without its causal mask, `flip` or `roll`.
        """
        layer, length = self.build(config), self.longest
        x_BTD = self.inputs(2, length)
        before_BTD = layer(x_BTD)
        for cut in sorted({0, 1, length // 2, length - 1}):
            changed_BTD = x_BTD.clone()
            changed_BTD[:, cut:] = 3 * self.inputs(2, length, seed=1)[:, cut:]
            after_BTD = layer(changed_BTD)
            if cut:
                what = f"outputs before token {cut} when it and later ones change"
                assert_close(after_BTD[:, :cut], before_BTD[:, :cut], self.tolerance, what)
            moved = (after_BTD[:, cut] - before_BTD[:, cut]).abs().max()
            assert moved > self.tolerance, f"output {cut} does not depend on token {cut}"

    @concerns("step", "forward", "init_state")
    @torch.no_grad()
    def test_prefill_and_steps_equal_forward(self, config: Any) -> None:
        """Whole, into a state, in uneven chunks, or token by token: the same outputs.

        Mend: Let `forward` with a state, and `step`, compute what `forward` alone does: start from
        what `state` holds, and write back all that later tokens need, biases and gates included.
        """
        layer = self.build(config)
        for length in self.lengths:
            x_BTD = self.inputs(2, length)
            expected_BTD = layer(x_BTD)
            sizes = _uneven(length)
            modes = {
                "prefill": layer(x_BTD, PLAIN, self.state(layer, 2, length)),
                "steps": run_steps(layer, x_BTD, self.state(layer, 2, length)),
                f"prefill in chunks {sizes}": run_chunks(
                    layer, x_BTD, self.state(layer, 2, length), sizes
                ),
            }
            for mode, actual_BTD in modes.items():
                what = f"{mode} against forward, length {length}"
                assert_close(actual_BTD, expected_BTD, self.tolerance, what)

    @concerns("step", "forward")
    @torch.no_grad()
    def test_steps_continue_a_prefill(self, config: Any) -> None:
        """Decoding after a prompt equals the forward over both.

        Mend: Write the state at the end of `forward(x, context, state)` exactly as `step` would
        have left it after the same tokens, and in place (assign to the given state's fields).
        """
        layer, length = self.build(config), self.longest
        x_BTD = self.inputs(2, length)
        cut = max(1, length // 2)
        state = self.state(layer, 2, length)
        layer(x_BTD[:, :cut], PLAIN, state)
        if cut < length:
            actual_BTD = run_steps(layer, x_BTD[:, cut:], state)
            expected_BTD = layer(x_BTD)[:, cut:]
            assert_close(actual_BTD, expected_BTD, self.tolerance, "steps after a prefill")

    @concerns("init_state", "forward", "step")
    @torch.no_grad()
    def test_selected_states_go_their_own_way(self, config: Any) -> None:
        """`State.select` copies rows: beams share a past and no future.

        Mend: Let `State.select` return copies of the rows (the inherited one does, for tensors
        whose dim 0 is the batch); keep nothing outside the state's tensors.
        """
        layer, length = self.build(config), 7
        x_BTD = self.inputs(2, length + 2)
        for rows in ([1, 0, 1], [0, 1]):
            state = self.state(layer, 2, length + 2)
            layer(x_BTD[:, :length], PLAIN, state)
            rows_B = torch.tensor(rows)
            beams = state.select(rows_B)
            other_BTD = self.inputs(len(rows), 2, seed=1)
            actual_BTD = run_steps(layer, other_BTD, beams)
            whole_BTD = torch.cat([x_BTD[rows_B, :length], other_BTD], dim=1)
            assert_close(actual_BTD, layer(whole_BTD)[:, -2:], self.tolerance, f"rows {rows}")
            original_BTD = run_steps(layer, x_BTD[:, length:], state)
            expected_BTD = layer(x_BTD)[:, -2:]
            what = f"the state that rows {rows} were selected from, afterwards"
            assert_close(original_BTD, expected_BTD, self.tolerance, what)

    @concerns("forward", "step")
    @pytest.mark.parametrize("padding", [1, 4, 30])
    def test_left_padding_leaks_nothing(self, config: Any, padding: int) -> None:
        """Outputs, gradients and further steps are those of the row without its padding.

        Mend: Use `context.attention_mask_BT`: recurrent layers take in zeros there
        (`context.mask_padding`, after what adds a bias), attention masks those keys, and a position
        counts from the first real token.
        """
        layer, length = self.build(config), padding + 5
        x_BTD = 3 * self.inputs(2, length + 2)
        mask_BT = torch.ones(2, length, dtype=torch.bool)
        mask_BT[1, :padding] = False
        context = Context(attention_mask_BT=mask_BT)
        weights_BTD = self.inputs(2, length, seed=1) * mask_BT[..., None]
        prompt_BTD = x_BTD[:, :length]
        y_BTD, gradient_BTD = run_with_gradient(layer, prompt_BTD, weights_BTD, context)
        state = self.state(layer, 2, length + 2)
        with torch.no_grad():
            prefilled_BTD = layer(prompt_BTD, context, state)
        stepped_BTD = run_steps(layer, x_BTD[:, length:], state)
        assert torch.equal(gradient_BTD[1, :padding], torch.zeros_like(x_BTD[1, :padding])), (
            "tokens depend on padding"
        )
        for row, start in ((0, 0), (1, padding)):
            alone = slice(row, row + 1), slice(start, length)
            expected_BTD, expected_gradient_BTD = run_with_gradient(
                layer, x_BTD[alone], weights_BTD[alone]
            )
            with torch.no_grad():
                after_BTD = layer(x_BTD[row : row + 1, start:])[:, -2:]
            what = f"{start} tokens of padding: "
            for actual, expected, which in (
                (y_BTD[alone], expected_BTD, "outputs"),
                (gradient_BTD[alone], expected_gradient_BTD, "gradients"),
                (prefilled_BTD[alone], expected_BTD, "prefill"),
                (stepped_BTD[row : row + 1], after_BTD, "steps after it"),
            ):
                assert_close(actual, expected, self.tolerance, what + which)

    @concerns("forward")
    def test_padding_stays_finite(self, config: Any) -> None:
        """A row of nothing but padding yields numbers, and so do its gradients.

        Mend: Divide by nothing that can be zero in a row of padding, and fill masked scores with a
        large finite number or guard the softmax.
        """
        layer = self.build(config)
        mask_BT = torch.ones(2, 7, dtype=torch.bool)
        mask_BT[0] = False
        mask_BT[1, :3] = False
        x_BTD = self.inputs(2, 7)
        context = Context(attention_mask_BT=mask_BT)
        y_BTD, gradient_BTD = run_with_gradient(layer, x_BTD, torch.ones_like(x_BTD), context)
        assert y_BTD.isfinite().all(), "outputs at padding"
        assert gradient_BTD.isfinite().all(), "gradients at padding"

    @concerns("forward")
    def test_documents_of_a_packed_row_are_strangers(self, config: Any) -> None:
        """Outputs and gradients of each document are those it has alone.

        Mend: Use `context.seq_idx_BT`: start anew (state, convolution, attention) wherever it
        differs from the token before, in the backward pass too.
        """
        layer = self.build(config)
        rows = ((1, 7, 33), (20, 1, 1, 19), (41,))
        length = 41
        x_BTD = self.inputs(len(rows), length)
        weights_BTD = self.inputs(len(rows), length, seed=1)
        context = Context(seq_idx_BT=_document_numbers(rows))
        y_BTD, gradient_BTD = run_with_gradient(layer, x_BTD, weights_BTD, context)
        gradients = []
        for row, documents in enumerate(rows):
            start = 0
            for size in documents:
                alone = slice(row, row + 1), slice(start, start + size)
                expected_BTD, expected_gradient_BTD = run_with_gradient(
                    layer, x_BTD[alone], weights_BTD[alone]
                )
                what = f"document at {start} of row {row}: "
                assert_close(y_BTD[alone], expected_BTD, self.tolerance, what + "outputs")
                gradients.append((gradient_BTD[alone], expected_gradient_BTD, what + "gradients"))
                start += size
        for actual, expected, what in gradients:
            assert_close(actual, expected, self.tolerance, what)

    @concerns("forward", "step")
    @torch.no_grad()
    def test_a_state_belongs_to_one_document(self, config: Any) -> None:
        """A packed call continues the state's document first, and leaves its last one in it.

        Mend: With a state and `seq_idx_BT`, let only the first document of the call continue the
        state, and leave only the last one's in it.
        """
        layer = self.build(config)
        x_BTD = self.inputs(2, 22)
        rows = ((13, 9), (6, 13, 3))
        seq_idx_BT = _document_numbers(rows)
        state = self.state(layer, 2, 22)
        layer(x_BTD[:, :5], PLAIN, state)
        packed_BTD = layer(x_BTD[:, 5:20], Context(seq_idx_BT=seq_idx_BT[:, 5:20]), state)
        actual_BTD = torch.cat([packed_BTD, run_steps(layer, x_BTD[:, 20:], state)], dim=1)
        for row, documents in enumerate(rows):
            alone_BTD = x_BTD[row : row + 1].split_with_sizes(documents, dim=1)
            expected_BTD = torch.cat([layer(document_BTD) for document_BTD in alone_BTD], dim=1)
            what = f"documents of row {row}, continuing a state, and steps after them"
            assert_close(actual_BTD[row], expected_BTD[0, 5:], self.tolerance, what)

    @concerns("forward", "step")
    @torch.no_grad()
    def test_prefix(self, config: Any) -> None:
        """Attention sees a prefix in both directions; nobody sees past it; decoding agrees.

        Mend: Attention lets the first `context.prefix_lengths_B` tokens see one another in both
        directions and nothing after them; any other kind ignores prefix lengths.
        """
        layer, length = self.build(config), 9
        x_BTD = self.inputs(2, length)
        prefix = Context(prefix_lengths_B=torch.tensor([5, 3]))
        before_BTD = layer(x_BTD, prefix)
        state = self.state(layer, 2, length)
        prompt_BTD = layer(x_BTD[:, :6], prefix, state)
        steps_BTD = run_steps(layer, x_BTD[:, 6:], state)
        decoded_BTD = torch.cat([prompt_BTD, steps_BTD], dim=1)
        assert_close(decoded_BTD, before_BTD, self.tolerance, "prefill and steps with a prefix")
        for row, cut in enumerate((5, 3)):
            changed_BTD = x_BTD.clone()
            changed_BTD[row, cut:] = self.inputs(2, length, seed=1)[row, cut:]
            after_BTD = layer(changed_BTD, prefix)
            what = f"outputs in a prefix of {cut} when later tokens change"
            assert_close(after_BTD[row, :cut], before_BTD[row, :cut], self.tolerance, what)
        if self.layer.kind == "attention":
            changed_BTD = x_BTD.clone()
            changed_BTD[:, 1] = self.inputs(2, length, seed=1)[:, 1]
            moved_B = (layer(changed_BTD, prefix) - before_BTD)[:, 0].abs().amax(-1)
            assert (moved_B > self.tolerance).all(), "token 0 does not see token 1 of its prefix"
        else:
            assert_close(before_BTD, layer(x_BTD), self.tolerance, "a prefix changes the outputs")


def _document_numbers(rows: Sequence[Sequence[int]]) -> Tensor:
    """`seq_idx` of rows that hold documents of the given lengths."""
    numbers = [[index for index, n in enumerate(row) for _ in range(n)] for row in rows]
    return torch.tensor(numbers, dtype=torch.int32)


def _uneven(length: int) -> list[int]:
    """Chunk sizes that add up to `length`, each twice the one before: 1, 2, 4, …, the rest."""
    sizes: list[int] = []
    size = 1
    while sum(sizes) + size < length:
        sizes.append(size)
        size *= 2
    return [*sizes, length - sum(sizes)]
