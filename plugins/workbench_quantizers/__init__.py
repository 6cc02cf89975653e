"""How weights are stored: int8 and int4 by groups, and packed ternaries (b1.58)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.hookspecs import hookimpl
from workbench_quantizers.groupwise import Int4, Int8
from workbench_quantizers.ternary import B158

if TYPE_CHECKING:
    from workbench.hookspecs import Register
    from workbench.quantizer import Quantizer


@hookimpl
def register_quantizers(register: Register[type[Quantizer]]) -> None:
    register("int8", Int8)
    register("int4", Int4)
    register("b1_58", B158)
