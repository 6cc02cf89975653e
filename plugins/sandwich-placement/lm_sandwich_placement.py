"""The sandwich ordering (Press, Smith and Levy 2020, arXiv:1911.03864) as a placement policy.

Their transformers have n self-attention and n feedforward sublayers in the order
s^k (s f)^(n - k) f^k: k of the first kind, then both in turn, then k of the second kind. Here the
two kinds are mixers. No torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from workbench.config import Mixer, Range
from workbench.errors import FieldError
from workbench.hookspecs import Register, hookimpl
from workbench.placement import Placement


class SandwichTransformer(Placement):
    """`coefficient` layers of the first mixer, both in turn, `coefficient` layers of the second.

    0 puts them in turn everywhere, half the depth puts all of the first before all of the second.
    At an odd depth, of which the paper has none, the first mixer has one layer more.

    Raises:
        FieldError: the two ends are longer than the depth, or a mixer is not offered.
    """

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        first: Annotated[str, Mixer("attention"), "mixer that leads (self-attention there)"]
        second: Annotated[str, Mixer("recurrent"), "mixer that ends (feedforward there)"]
        coefficient: Annotated[int, Range(0, 6), "k: layers of one mixer at each end"] = 2

        def __post_init__(self) -> None:
            if self.coefficient < 0:
                raise FieldError("coefficient", f"must be at least 0, got {self.coefficient}")

    reference: ClassVar[str] = "Improving Transformer Models by Reordering, arXiv:1911.03864"

    @classmethod
    def place(cls, num_layers: int, mixers: Sequence[str], config: Any) -> tuple[str, ...]:
        for field in ("first", "second"):
            name = getattr(config, field)
            if name not in mixers:
                raise FieldError(
                    field, f"{name!r} is not offered: the mixers are {', '.join(mixers)}"
                )
        ends: int = config.coefficient
        between = num_layers - 2 * ends
        if between < 0:
            raise FieldError(
                "coefficient",
                f"two ends of {ends} do not fit into a depth of {num_layers}: "
                f"use at most {num_layers // 2}",
            )
        first, second = str(config.first), str(config.second)
        in_turn = tuple((first, second)[index % 2] for index in range(between))
        return (first,) * ends + in_turn + (second,) * ends


@hookimpl
def register_placements(register: Register[type[Placement]]) -> None:
    register("sandwich_transformer", SandwichTransformer)
