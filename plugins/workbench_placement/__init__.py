"""Built-in placement policies: which mixer goes where. No torch."""

from __future__ import annotations

from workbench.hookspecs import Register, hookimpl
from workbench.placement import Placement
from workbench_placement.explicit import Free, Pattern, Uniform
from workbench_placement.mixed import EvenlySpaced, Periodic, PrefixSuffix, Sandwich, Strategic


@hookimpl
def register_placements(register: Register[type[Placement]]) -> None:
    register("periodic", Periodic)
    register("evenly_spaced", EvenlySpaced)
    register("prefix_suffix", PrefixSuffix)
    register("strategic", Strategic)
    register("sandwich", Sandwich)
    register("uniform", Uniform)
    register("pattern", Pattern)
    register("free", Free)
