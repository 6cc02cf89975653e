"""torch.compile for models that are made of few kinds of blocks.

A block is compiled, not the model: blocks of equal layer, Config and sizes share one compilation,
within a model and with every later model of the process. A search over layouts therefore pays for
each kind of block once, and not for each layout.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from workbench.model import HybridLM

# Padded rows would be copied for every operator that is not the compiler's own.
OPTIONS: dict[str, Any] = {"comprehensive_padding": False}
# Kinds of blocks that a process may compile; past the limit torch would run the rest uncompiled.
LIMIT = 4096


class _Clock:
    """Seconds of this process's `preparing` blocks, and how many of them are entered."""

    seconds = 0.0
    depth = 0


@contextmanager
def preparing(device: torch.device | str) -> Iterator[None]:
    """Run first calls inside the `with`: what compiles, tunes, loads and captures kernels.

    Their wall seconds, up to the end of the device's work, are counted apart (`prepared_seconds`).
    Blocks may be nested.
    """
    started = time.perf_counter()
    _Clock.depth += 1
    try:
        yield
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
    finally:
        _Clock.depth -= 1
        if _Clock.depth == 0:
            _Clock.seconds += time.perf_counter() - started


def prepared_seconds() -> float:
    """Seconds that this process has spent in `preparing`: compare two moments."""
    return _Clock.seconds


@contextmanager
def compiled_blocks(model: HybridLM, *methods: str, **options: Any) -> Iterator[None]:
    """Run `methods` of the model's blocks (`forward`, `step`) compiled inside the `with`.

    Args:
        options: of torch.compile's inductor.
    """
    for layer in model.layers:
        for dtype in (torch.float32, torch.bfloat16):
            layer.backends(dtype)  # found before the tracing, which is no place to run kernels
    config: Any = torch._dynamo.config
    with config.patch(recompile_limit=LIMIT, accumulated_recompile_limit=LIMIT * 4):
        for block in model.blocks:
            for method in methods:
                function = getattr(block, method)
                compiled = torch.compile(function, dynamic=False, options=OPTIONS | options)
                setattr(block, method, compiled)
        try:
            yield
        finally:
            for block in model.blocks:
                for method in methods:
                    delattr(block, method)
