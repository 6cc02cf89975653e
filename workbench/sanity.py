"""A quick look at a model before time is spent on it, and again before its figures count.

Shape suffixes: B batch, T tokens, D d_model.

A layer that sees the future would win every study, so each model is run twice on a few tokens, the
second time with other tokens at the end: what stands before them must not move.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.model import HybridLM

if TYPE_CHECKING:
    from workbench.builder import Builder

ROWS, LENGTH = 2, 80  # longer than the usual chunk of 64, and no multiple of it
# Relative to a block's largest output. Rounding moves earlier outputs by 1e-6 where a layer mixes
# the sequence by Fourier transforms; a block that rounds to few levels makes more of that.
LEAK, LEAK_DOWNSTREAM = 1e-4, 2e-2


class FaultyLayerError(WorkbenchError):
    """A layer breaks its contract in a trial; the message names its block."""


def check_outputs(model: HybridLM, length: int = LENGTH) -> None:
    """Refuse a model whose layers return the wrong shape or NaN, or leak the future.

    Args:
        length: tokens to look at, at most `LENGTH`.

    Raises:
        FaultyLayerError: names the first block at fault.
    """
    tokens_BT = _tokens(model, length)
    _compare(model, tokens_BT, _outputs(model, tokens_BT))


def check_causality(model: HybridLM, length: int = LENGTH) -> None:
    """Refuse a model in which a block leaks the future, whatever else it returns.

    Raises:
        FaultyLayerError: names the first block that does.
    """
    tokens_BT = _tokens(model, length)
    _compare(model, tokens_BT, _outputs(model, tokens_BT, check=False))


def first_without_number(model: HybridLM, length: int = LENGTH) -> str:
    """The first block that makes NaN or infinity of numbers when training, in words; else empty."""
    try:
        with _watched(model, training=True), torch.no_grad():
            model(_tokens(model, length))
    except FaultyLayerError as error:
        return str(error)
    return ""


def culprit(builder: Builder, model: HybridLM, length: int = LENGTH) -> str:
    """`; blocks[…] … returns NaN`, if a block makes it of numbers now, or did at first; else empty.

    Args:
        model: whose training diverged: its weights may hold no numbers any more.
    """
    for candidate in (model, builder.build(model.layout, device=model.device)):
        if found := first_without_number(candidate, length):
            return f"; {found}"
    return ""


def _tokens(model: HybridLM, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, min(length, LENGTH))
    return torch.randint(model.layout.vocab_size, shape, generator=generator).to(model.device)


def _compare(model: HybridLM, tokens_BT: Tensor, before: list[Tensor]) -> None:
    start = tokens_BT.shape[1] * 2 // 3
    other_BT = tokens_BT.clone()
    other_BT[:, start:] = (other_BT[:, start:] + 1) % model.layout.vocab_size
    noisy = False  # an earlier block moved by rounding
    for index, (a, b) in enumerate(
        zip(before, _outputs(model, other_BT, check=False), strict=True)
    ):
        moved = float((a - b)[:, :start].abs().max()) if start else 0.0
        scale = float(torch.maximum(a.abs().max(), b.abs().max()))
        if not math.isfinite(moved):  # before or after: what diverged is told elsewhere
            return
        if moved > (LEAK_DOWNSTREAM if noisy else LEAK) * scale:
            raise FaultyLayerError(
                f"{_name(model, index)} leaks the future: other tokens from position {start} on "
                f"moved its outputs before that by {moved / scale:.2g} of the largest. Its losses "
                "would be too good to be true."
            )
        noisy = noisy or moved > 0


def _outputs(model: HybridLM, tokens_BT: Tensor, check: bool = True) -> list[Tensor]:
    """What each block's layer returns, from the input up."""
    with _watched(model, check=check) as seen, torch.no_grad():
        model(tokens_BT)
    return seen


@contextlib.contextmanager
def _watched(model: HybridLM, check: bool = True, training: bool = False) -> Iterator[list[Tensor]]:
    """Inside, what the layers return is kept, and refused where it breaks the contract."""
    seen: list[Tensor] = []
    was_training = model.training
    handles = [
        layer.register_forward_hook(_hook(model, index, seen, check))
        for index, layer in enumerate(model.layers)
    ]
    model.train(training)
    try:
        yield seen
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()


def _hook(model: HybridLM, index: int, seen: list[Tensor], check: bool) -> Any:
    def hook(layer: Any, inputs: tuple[Any, ...], y_BTD: Any) -> None:
        if check:
            _refuse(_name(model, index), inputs[0], y_BTD)
        seen.append(y_BTD.detach().float())

    return hook


def _refuse(name: str, x_BTD: Tensor, y_BTD: Any) -> None:
    if not isinstance(y_BTD, Tensor):
        raise FaultyLayerError(f"{name} returns {type(y_BTD).__name__}: a layer owes a tensor")
    if y_BTD.shape != x_BTD.shape:
        raise FaultyLayerError(
            f"{name} returns shape {list(y_BTD.shape)} for inputs of shape {list(x_BTD.shape)}: "
            "a layer owes the same"
        )
    if bool(x_BTD.isfinite().all()) and not bool(y_BTD.isfinite().all()):
        kind = "NaN" if y_BTD.isnan().any() else "infinity"
        raise FaultyLayerError(f"{name} returns {kind} for finite inputs")


def check_construction(model: HybridLM) -> None:
    """Refuse a model built on the meta device in which a layer allocated all the same.

    Raises:
        FaultyLayerError: names the block and its tensor.
    """
    for index, layer in enumerate(model.layers):
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            if tensor.device.type != "meta":
                raise FaultyLayerError(
                    f"{_name(model, index)} allocates {name!r} on {tensor.device} when it is built "
                    "on the meta device: its constructor must hand `device` and `dtype` on to "
                    "every tensor and module"
                )


def _name(model: HybridLM, index: int) -> str:
    return f"blocks[{index}] ({model.layout.blocks[index].layer})"
