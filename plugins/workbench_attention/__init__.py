"""Grouped-query attention with a key-value cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.hookspecs import hookimpl

if TYPE_CHECKING:
    from workbench.hookspecs import Register
    from workbench.layer import Layer


@hookimpl
def register_layers(register: Register[type[Layer]]) -> None:
    from workbench_attention.attention import Attention

    register("attention", Attention)
