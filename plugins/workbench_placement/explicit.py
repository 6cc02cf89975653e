"""Policies that say outright what goes where: one mixer, a tiled pattern, a choice a layer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from workbench.config import Mixer, PerLayer
from workbench.errors import FieldError
from workbench.placement import Placement
from workbench_placement.common import layers, offered

TERM = re.compile(r"(?:(?P<count>[1-9]\d*)\s*\*\s*)?(?P<name>[^\s,*]+)")


class Uniform(Placement):
    """One mixer everywhere: the baselines that hybrids must beat."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        mixer: Annotated[str, Mixer(), "mixer of every layer"]

    reference: ClassVar[str] = "Mamba, arXiv:2312.00752; Transformer, arXiv:1706.03762"

    @classmethod
    def place(cls, num_layers: int, mixers: Sequence[str], config: Any) -> tuple[str, ...]:
        return (offered("mixer", config.mixer, mixers),) * num_layers


class Pattern(Placement):
    """A written pattern, tiled over the depth: `"3*mamba2, attention"`.

    Names are separated by commas; `3*` repeats the name after it. Where the depth is no multiple
    of the pattern, the last tile is cut short. It is text, so that a study can list several
    patterns to choose from.

    Raises:
        FieldError: the pattern cannot be read or is longer than the depth.
    """

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        pattern: Annotated[str, 'mixers separated by commas, tiled: "3*mamba2, attention"']

        def __post_init__(self) -> None:
            expand(self.pattern)

    reference: ClassVar[str] = "Nemotron-H, arXiv:2504.03624 (its pattern strings)"

    @classmethod
    def place(cls, num_layers: int, mixers: Sequence[str], config: Any) -> tuple[str, ...]:
        tile = [offered("pattern", name, mixers) for name in expand(config.pattern)]
        if len(tile) > num_layers:
            raise FieldError("pattern", f"names {layers(len(tile))}, the depth is {num_layers}")
        return tuple(tile[index % len(tile)] for index in range(num_layers))


def expand(pattern: str) -> list[str]:
    """The names that a pattern's text stands for.

    Raises:
        FieldError: a term that is no name, or no positive count and a name.
    """
    names: list[str] = []
    for term in pattern.split(","):
        match = TERM.fullmatch(term.strip())
        if match is None:
            raise FieldError(
                "pattern",
                f"cannot read {term.strip()!r} in {pattern!r}: "
                'write names separated by commas, such as "3*mamba2, attention"',
            )
        names += [match["name"]] * int(match["count"] or 1)
    return names


class Free(Placement):
    """Every layer chooses for itself: the largest space.

    Raises:
        FieldError: there is not exactly one name a layer.
    """

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        mixers: Annotated[tuple[str, ...], PerLayer(Mixer()), "mixer of each layer"]

    reference: ClassVar[str] = "Zoph and Le, arXiv:1611.01578: each layer chosen on its own"

    @classmethod
    def place(cls, num_layers: int, mixers: Sequence[str], config: Any) -> tuple[str, ...]:
        if len(config.mixers) != num_layers:
            raise FieldError(
                "mixers", f"names {layers(len(config.mixers))}, the depth is {num_layers}"
            )
        return tuple(offered("mixers", name, mixers) for name in config.mixers)
