"""Mamba, Mamba-2 and BitLinear-Mamba layers."""

from __future__ import annotations

from workbench.hookspecs import Register, hookimpl
from workbench.layer import Layer
from workbench_mamba.bitlinear_mamba import BitLinearMamba
from workbench_mamba.mamba import Mamba
from workbench_mamba.mamba2 import Mamba2


@hookimpl
def register_layers(register: Register[type[Layer]]) -> None:
    register("mamba", Mamba)
    register("mamba2", Mamba2)
    register("bitlinear_mamba", BitLinearMamba)
