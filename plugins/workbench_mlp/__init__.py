"""Feed-forward layers: SwiGLU and squared ReLU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.hookspecs import hookimpl

if TYPE_CHECKING:
    from workbench.hookspecs import Register
    from workbench.layer import Layer


@hookimpl
def register_layers(register: Register[type[Layer]]) -> None:
    from workbench_mlp.relu2 import ReLU2MLP
    from workbench_mlp.swiglu import SwiGLU

    register("swiglu", SwiGLU)
    register("relu2_mlp", ReLU2MLP)
