"""Policies that mix two mixers: a recurrent majority and an attention minority.

Indices count from 0 at the input. A depth that a policy's Config does not fit is refused with the
field named; nothing is moved or left out to make it fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from workbench.config import Range
from workbench.errors import FieldError
from workbench.placement import Placement
from workbench_placement.common import TwoMixers, at_least, layers, put, spread


class Periodic(Placement):
    """One minority layer in every `period`, at `offset`: where `index % period == offset`.

    A last period that the depth cuts short counts: its minority layer is there if its place is.

    Raises:
        FieldError: `offset` lies outside the period or beyond the last layer.
    """

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(TwoMixers):
        period: Annotated[int, Range(2, 8), "layers of which one is a minority layer"] = 8
        offset: Annotated[int, Range(0, 4), "its place in each period, from 0"] = 4

        def __post_init__(self) -> None:
            at_least("period", self.period, 1)
            at_least("offset", self.offset, 0)
            if self.offset >= self.period:
                raise FieldError("offset", f"{self.offset} must be below period = {self.period}")

    reference: ClassVar[str] = "Jamba, arXiv:2403.19887"

    @classmethod
    def place(cls, num_layers: int, mixers: Sequence[str], config: Any) -> tuple[str, ...]:
        if config.offset >= num_layers:
            raise FieldError(
                "offset",
                f"{config.offset} is beyond {layers(num_layers)}: "
                f"use at most {num_layers - 1} or more layers",
            )
        return put(num_layers, mixers, config, range(config.offset, num_layers, config.period))


class EvenlySpaced(Placement):
    """`count` minority layers in the middles of `count` equal parts of the depth.

    Raises:
        FieldError: `count` exceeds the number of layers.
    """

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(TwoMixers):
        count: Annotated[int, Range(1, 4), "minority layers"] = 1

        def __post_init__(self) -> None:
            at_least("count", self.count, 1)

    reference: ClassVar[str] = "An Empirical Study of Mamba-based Language Models, arXiv:2406.07887"

    @classmethod
    def place(cls, num_layers: int, mixers: Sequence[str], config: Any) -> tuple[str, ...]:
        if config.count > num_layers:
            raise FieldError(
                "count", f"{layers(config.count)} do not fit into {layers(num_layers)}"
            )
        return put(num_layers, mixers, config, spread(config.count, 0, num_layers))


class PrefixSuffix(Placement):
    """All majority layers first, the minority last, `ratio` to one.

    Where the depth is no multiple of `ratio + 1`, the layers left over join the prefix.

    Raises:
        FieldError: there are fewer than `ratio + 1` layers.
    """

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(TwoMixers):
        ratio: Annotated[int, Range(1, 7), "majority layers for each minority layer"] = 2

        def __post_init__(self) -> None:
            at_least("ratio", self.ratio, 1)

    reference: ClassVar[str] = "Mamba-GLM: Mamba prefix, attention suffix, 2:1"

    @classmethod
    def place(cls, num_layers: int, mixers: Sequence[str], config: Any) -> tuple[str, ...]:
        suffix = num_layers // (config.ratio + 1)
        if suffix == 0:
            raise FieldError(
                "ratio",
                f"{config.ratio}:1 needs at least {layers(config.ratio + 1)}, not {num_layers}",
            )
        return put(num_layers, mixers, config, range(num_layers - suffix, num_layers))


class Strategic(Placement):
    """Minority layers where they matter most: the first, some in the middle, and the last.

    The first `early` and the last `top` layers are minority layers, and `middle` more are evenly
    spaced among those between.

    Raises:
        FieldError: the three do not fit into the depth; names `middle` if `early` and `top` alone
            would.
    """

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(TwoMixers):
        early: Annotated[int, Range(1, 2), "minority layers at the input: patterns"] = 2
        middle: Annotated[int, Range(1, 4), "spaced minority layers between: reasoning"] = 2
        top: Annotated[int, Range(2, 3), "minority layers at the output: refinement"] = 3

        def __post_init__(self) -> None:
            for field in ("early", "middle", "top"):
                at_least(field, getattr(self, field), 0)

    reference: ClassVar[str] = "Hybrid Mamba-Transformer SLM: strategic layer placement"

    @classmethod
    def place(cls, num_layers: int, mixers: Sequence[str], config: Any) -> tuple[str, ...]:
        early, middle, top = config.early, config.middle, config.top
        between = num_layers - early - top
        if between < 0:
            raise FieldError(
                "top", f"{early} early and {top} top layers do not fit into {layers(num_layers)}"
            )
        if middle > between:
            raise FieldError(
                "middle",
                f"{middle} do not fit: {early} early and {top} top of {layers(num_layers)} "
                f"leave {between} between",
            )
        indices = {
            *range(early),
            *spread(middle, early, num_layers - top),
            *range(num_layers - top, num_layers),
        }
        return put(num_layers, mixers, config, indices)


class Sandwich(Placement):
    """Minority layers at both ends, `depth` each, the majority between.

    Raises:
        FieldError: the ends leave no layer between.
    """

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(TwoMixers):
        depth: Annotated[int, Range(1, 2), "minority layers at each end"] = 1

        def __post_init__(self) -> None:
            at_least("depth", self.depth, 1)

    reference: ClassVar[str] = "Hymba, arXiv:2411.13676: full attention at both ends (and midway)"

    @classmethod
    def place(cls, num_layers: int, mixers: Sequence[str], config: Any) -> tuple[str, ...]:
        depth = config.depth
        if num_layers <= 2 * depth:
            raise FieldError(
                "depth", f"two ends of {depth} leave nothing between in {layers(num_layers)}"
            )
        ends = {*range(depth), *range(num_layers - depth, num_layers)}
        return put(num_layers, mixers, config, ends)
