"""A found layout at another size: more layers and wider ones, its pattern and ratios kept.

Depth and width grow together. The aspect, d_model over the number of layers (a mixer with the MLPs
after it is one layer), is the original's, moved into 32 to 128, where published families lie
(Mamba-130M: 32, arXiv:2312.00752; GPT-3 6.7B: 128, arXiv:2005.14165). Of the sizes whose
d_model is a multiple of 64 and that have the wanted number of parameters to within 2 %, the one is
taken that is nearest to that aspect and to that number: the least
`|log2(aspect / wanted aspect)| + 10 |error|`. Where there is none, multiples of 32, then of 16.

Parameters are counted by the builder; nothing is allocated.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

from workbench.builder import Builder
from workbench.errors import FieldError, WorkbenchError
from workbench.figures import figure
from workbench.layout import Layout
from workbench.scaling_placement import Placer
from workbench.scaling_width import widened

TOLERANCE = 0.02
ASPECTS = (32.0, 128.0)  # d_model over layers
STEPS = (64, 32, 16)  # of d_model; a finer one where the coarser ones miss
MOST_LAYERS = 512
MOST_WIDTH = 32_768
REACH = 4.0  # how far off a size along the aspect may be for its width to be tried at other depths
MOST_DIGITS = 30  # of a count; more is a slip of the hand
COUNT = re.compile(r"(\d[\d_]*(?:\.\d+)?(?:e\d{1,2})?)([kKmMbBgGtT]?)", re.ASCII)
UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}


def parse_count(text: str, field: str = "--params") -> int:
    """`1.3B`, `350M`, `125_000_000` or `1e9` as a number.

    Raises:
        FieldError: it is none, or below one.
    """
    match = COUNT.fullmatch(text.strip())
    if match is None or len(text) > MOST_DIGITS:
        shown = text if len(text) <= MOST_DIGITS else f"{text[:MOST_DIGITS]}…"
        raise FieldError(
            field, f"{shown!r} is no number of parameters: write 1.3B, 350M or 2_000_000"
        )
    number = round(float(match[1].replace("_", "")) * UNITS[match[2].lower()])
    if number < 1:
        raise FieldError(field, f"must be at least 1, got {text}")
    return number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaled:
    """A layout at another size.

    Attributes:
        layout: resolved.
        num_layers: mixers in it.
        parameters: exact, shared weights once.
        target: what was asked for.
        placement: how the layers were placed, in words.
        aspect: the wanted d_model over layers.
    """

    layout: Layout
    num_layers: int
    parameters: int
    target: int
    placement: str
    aspect: float

    @property
    def error(self) -> float:
        """How far it is from the target: 0.01 is 1 % too many parameters."""
        return self.parameters / self.target - 1

    @property
    def is_close(self) -> bool:
        """Whether it hits the target within 2 %."""
        return abs(self.error) <= TOLERANCE

    @property
    def distance(self) -> float:
        """What is least for the size that is taken."""
        off = math.log2(self.layout.d_model / self.num_layers / self.aspect)
        return abs(off) + 10 * abs(self.error)


def scale(
    builder: Builder,
    layout: Layout,
    placer: Placer,
    target: int,
    *,
    num_layers: int | None = None,
    d_model: int | None = None,
) -> Scaled:
    """The layout's pattern at the size nearest to `target` parameters.

    Args:
        layout: resolved; its vocabulary is that of the result.
        placer: of its pattern.
        num_layers, d_model: fixed, if given; one of them.

    Returns:
        A size within 2 % of the target if there is one, else the nearest.

    Raises:
        FieldError: both are fixed, or the target is beyond what can be built, on either side.
    """
    sizes = _Sizes(builder, layout, placer, target)
    _check(sizes.fewest, num_layers, d_model)
    if d_model is not None:
        found = sizes.at_width(d_model)
        _require_buildable(sizes, found, f"d_model = {d_model}")
        return _reached(sizes, found, num_layers, d_model)
    found = []
    for step in STEPS:
        found += sizes.search(step, num_layers)
        _require_buildable(sizes, found, f"d_model in multiples of {step}")
        if _best(found).is_close or sizes.is_all_below:
            break
    return _reached(sizes, found, num_layers, d_model)


def _check(fewest: int, num_layers: int | None, d_model: int | None) -> None:
    if num_layers is not None and d_model is not None:
        raise FieldError("--depth", "leave it or --d-model free: one must reach the target")
    if num_layers is not None and not fewest <= num_layers <= MOST_LAYERS:
        raise FieldError(
            "--depth",
            f"must be from {fewest} (fewer would lose a kind of layer) to {MOST_LAYERS}, got "
            f"{num_layers}",
        )
    if d_model is not None and not 1 <= d_model <= MOST_WIDTH:
        raise FieldError("--d-model", f"must be from 1 to {MOST_WIDTH:,}, got {d_model}")


def _best(found: Iterable[Scaled]) -> Scaled:
    close = [size for size in found if size.is_close]
    if close:
        return min(close, key=lambda size: size.distance)
    return min(found, key=lambda size: abs(size.error))


def _require_buildable(sizes: _Sizes, found: list[Scaled], what: str) -> None:
    if not found:
        raise WorkbenchError(f"no model with {what} can be built: {sizes.refusal}")


def _reached(
    sizes: _Sizes, found: list[Scaled], num_layers: int | None, d_model: int | None
) -> Scaled:
    """The best size, unless the target lies beyond the smallest or the largest one.

    Raises:
        FieldError: names what was reached.
    """
    best = _best(found)
    if best.is_close:
        return best
    target, size = figure(best.target, "parameters"), best.layout.d_model
    reached = (
        f"d_model {size:,} with {best.num_layers} layers has "
        f"{figure(best.parameters, 'parameters')} parameters"
    )
    if best.error > 0 and (best.num_layers <= sizes.fewest or num_layers is not None):
        if d_model is not None:
            raise FieldError("--d-model", f"too wide for {target}: {reached} already")
        if num_layers is not None and size == sizes.narrowest:
            raise FieldError("--depth", f"too many for {target}: {reached} already")
        if size == sizes.narrowest:
            raise FieldError("--params", f"{target} is smaller than can be built: {reached}")
    if best.error < 0 and best.num_layers >= MOST_LAYERS and d_model is not None:
        raise FieldError("--d-model", f"too narrow for {target}: {reached}")
    if sizes.is_all_below:
        field = "--depth" if num_layers is not None else "--params"
        raise FieldError(field, f"{target} cannot be reached: {reached}")
    return best


class _Sizes:
    """Sizes of one layout, counted exactly.

    Attributes:
        fewest: layers from which on no kind of layer is lost.
        narrowest: least width that could be built so far; 0 for none.
        is_all_below: whether the widest size of the last search is below the target.
        refusal: why the last size that was refused cannot be built.
    """

    def __init__(self, builder: Builder, layout: Layout, placer: Placer, target: int) -> None:
        self.builder, self.layout, self.placer, self.target = builder, layout, placer, target
        kinds = placer.pattern.kinds
        self.fewest = placer.fewest
        low, high = ASPECTS
        self.aspect = min(max(layout.d_model / len(kinds), low), high)
        self.refusal = ""
        self.narrowest = 0
        self.is_all_below = False

    def depth_of(self, width: int) -> int:
        """Layers that the aspect gives a width."""
        return min(max(round(width / self.aspect), self.fewest), MOST_LAYERS)

    def search(self, step: int, num_layers: int | None) -> list[Scaled]:
        """Sizes about the target, their widths multiples of `step`.

        Args:
            num_layers: of each, if fixed.
        """
        widest = self.at(MOST_WIDTH, num_layers or self.depth_of(MOST_WIDTH))
        if widest is not None and widest.parameters < self.target:
            self.is_all_below = True
            return [widest]
        near: list[Scaled] = []
        for width in range(step, MOST_WIDTH + 1, step):
            size = self.at(width, num_layers or self.depth_of(width))
            if size is not None:
                near.append(size)
                if size.parameters > REACH * self.target:
                    break
        self.is_all_below = all(size.parameters < self.target for size in near)
        if num_layers is not None:
            return near
        widths = [
            size.layout.d_model
            for size in near
            if 1 / REACH <= size.parameters / self.target <= REACH
        ] or [size.layout.d_model for size in near[-2:]]
        return [size for width in widths for size in self.at_width(width)]

    def at_width(self, width: int) -> list[Scaled]:
        """Sizes of one width about the target."""
        tried: dict[int, Scaled | None] = {}
        depth = self.depth_of(width)
        outside = self.layout.vocab_size * width * (1 if self.layout.tie_embeddings else 2)
        while depth not in tried:
            size = tried[depth] = self.at(width, depth)
            if size is None:
                break
            a_layer = max(size.parameters - outside, 1) / depth  # 1: layers without weights
            wanted = round((self.target - outside) / a_layer)
            depth = min(max(wanted, self.fewest), MOST_LAYERS)
        for near in (depth - 1, depth + 1):
            if self.fewest <= near <= MOST_LAYERS and near not in tried:
                tried[near] = self.at(width, near)
        return [size for size in tried.values() if size is not None]

    def at(self, width: int, num_layers: int) -> Scaled | None:
        """One size; None if it cannot be built."""
        kinds, placement = self.placer.place(num_layers)
        before, layers = self.layout.d_model, self.placer.pattern.layers
        try:
            wide = [tuple(widened(block, before, width) for block in layer) for layer in layers]
            blocks = tuple(block for kind in kinds for block in wide[kind])
            layout = self.builder.resolve(self.layout.replace(d_model=width, blocks=blocks))
            # How weights are stored does not change their number, and takes longer to count.
            plain = tuple(dataclasses.replace(block, quantizer=None) for block in layout.blocks)
            costs = self.builder.costs(layout.replace(blocks=plain), length=1)
        except FieldError as error:
            self.refusal = str(error)
            return None
        self.narrowest = min(self.narrowest or width, width)
        return Scaled(
            layout=layout,
            num_layers=num_layers,
            parameters=costs.total.parameters,
            target=self.target,
            placement=placement,
            aspect=self.aspect,
        )
