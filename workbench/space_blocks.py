"""What is chosen for the blocks of a layout: for all alike, or for each on its own. No torch.

A layer here is a mixer with the MLP after it, as `num_layers` counts them. Parameters of one block
end with its layer's index, from 0 at the input, as `free.mixers.3` does; those of the MLP after a
mixer begin with `mlp.`:

| `per_block` | all blocks alike | the mixer of layer 3 | the MLP after it |
|---|---|---|---|
| `mlp` | `mlp` | | `mlp.3` |
| `layers` | `mamba2.d_state` | `mamba2.d_state.3` | `mlp.swiglu.expand.3` |
| `quantizer` | `quantizer` | `quantizer.3` | `mlp.quantizer.3` |
| | `int8.group_size` | `int8.group_size.3` | `mlp.int8.group_size.3` |

The index is the layer's and not the block's, because a block's moves with every MLP below it: a
sampler would then learn of one place under many names.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from workbench.layout import Block, Named
from workbench.space_sources import Source, Suggester, choose, draw_config

NONE = "none"
ONE_BLOCK = re.compile(r"(mlp\.)?quantizer\.\d+")  # parameters that name one block's quantizer
PER_BLOCK = ("quantizer", "mlp", "layers")  # what blocks may choose on their own


@dataclasses.dataclass(frozen=True)
class Place:
    """One block of a layout that is being drawn.

    Attributes:
        layer: its name.
        index: of its layer, from the input up.
        is_mlp: whether it follows the mixer of that layer.
    """

    layer: str
    index: int
    is_mlp: bool

    def named(self, name: str) -> str:
        """The parameter of this block alone that is `name` where all blocks share it."""
        return f"{'mlp.' if self.is_mlp else ''}{name}.{self.index}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockChoices:
    """Turns placed mixers into blocks.

    Attributes:
        mixers, mlps, quantizers: names offered; `none` for no MLP, and for weights as trained.
        layer_fields, quantizer_fields: where the searched Config fields get their values, by name.
        per_block: what is drawn for each block on its own, of `PER_BLOCK`.
    """

    mixers: tuple[str, ...]
    mlps: tuple[str, ...]
    quantizers: tuple[str, ...]
    layer_fields: Mapping[str, Mapping[str, Source]]
    quantizer_fields: Mapping[str, Mapping[str, Source]]
    per_block: tuple[str, ...]

    def draw(self, trial: Suggester, mixers: Sequence[str]) -> tuple[Block, ...]:
        """The blocks, from the input up."""
        places = []
        for index, (mixer, mlp) in enumerate(zip(mixers, self._mlps(trial, mixers), strict=True)):
            places.append(Place(mixer, index, False))
            if mlp != NONE:
                places.append(Place(mlp, index, True))
        configs = self._configs(trial, places)
        stored = self._stored(trial, places)
        return tuple(
            Block(layer=place.layer, config=config, quantizer=quantizer)
            for place, config, quantizer in zip(places, configs, stored, strict=True)
        )

    def _mlps(self, trial: Suggester, mixers: Sequence[str]) -> list[str]:
        if "mlp" in self.per_block:
            return [choose(trial, f"mlp.{index}", self.mlps) for index in range(len(mixers))]
        return [choose(trial, "mlp", self.mlps)] * len(mixers)

    def _configs(self, trial: Suggester, places: Sequence[Place]) -> list[dict[str, Any]]:
        if "layers" in self.per_block:
            return [self._config(trial, place.layer, place.named) for place in places]
        drawn: dict[str, dict[str, Any]] = {}
        for place in sorted(places, key=lambda place: place.is_mlp):
            if place.layer not in drawn:
                drawn[place.layer] = self._config(trial, place.layer, _for_all)
        return [drawn[place.layer] for place in places]

    def _config(self, trial: Suggester, layer: str, named: Callable[[str], str]) -> dict[str, Any]:
        fields = self.layer_fields[layer]
        return draw_config(trial, fields, lambda field: named(f"{layer}.{field}"))

    def _stored(self, trial: Suggester, places: Sequence[Place]) -> list[Named | None]:
        if "quantizer" in self.per_block:
            return [self._quantizer(trial, place.named) for place in places]
        return [self._quantizer(trial, _for_all)] * len(places)

    def _quantizer(self, trial: Suggester, named: Callable[[str], str]) -> Named | None:
        name = choose(trial, named("quantizer"), self.quantizers)
        if name == NONE:
            return None
        fields = self.quantizer_fields[name]
        return Named(
            name=name, config=draw_config(trial, fields, lambda field: named(f"{name}.{field}"))
        )

    def read(self, blocks: Sequence[Block]) -> Iterator[dict[str, Any]]:
        """The parameters of single blocks that make these blocks, those with one value too.

        Several where it does not show which blocks are mixers, because a layer is offered as mixer
        and as MLP; one that is empty where no parameter is of a single block, or a layer is not
        offered.
        """
        found = False
        for places in self._places(blocks) if self.per_block else ():
            found = True
            yield self._values(places, blocks)
        if not found:
            yield {}

    def _places(self, blocks: Sequence[Block]) -> Iterator[tuple[Place, ...]]:
        """Every way to see a sequence of blocks as mixers, each with an MLP or none."""
        waiting: list[tuple[Place, ...]] = [()]
        while waiting:
            places = waiting.pop()
            if len(places) == len(blocks):
                yield places
                continue
            layer = blocks[len(places)].layer
            last = places[-1] if places else Place("", -1, True)
            if layer in self.mlps and not last.is_mlp:
                waiting.append((*places, Place(layer, last.index, True)))
            if layer in self.mixers:
                waiting.append((*places, Place(layer, last.index + 1, False)))

    def _values(self, places: Sequence[Place], blocks: Sequence[Block]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if "mlp" in self.per_block:
            values |= {f"mlp.{place.index}": NONE for place in places}
            values |= {f"mlp.{place.index}": place.layer for place in places if place.is_mlp}
        for place, block in zip(places, blocks, strict=True):
            if "layers" in self.per_block:
                values |= _fields(place, block.layer, block.config)
            if "quantizer" in self.per_block:
                stored = block.quantizer
                values[place.named("quantizer")] = NONE if stored is None else stored.name
                if stored is not None:
                    values |= _fields(place, stored.name, stored.config)
        return values


def stored_as(params: Mapping[str, Any]) -> str | None:
    """How a trial's weights are stored, by its parameters; None where they do not say.

    One name for all blocks, or `int8 ×3, none ×1` where blocks chose on their own.
    """
    chosen = Counter(str(value) for name, value in params.items() if ONE_BLOCK.fullmatch(name))
    if len(chosen) > 1:
        return ", ".join(f"{name} ×{count}" for name, count in chosen.most_common())
    return next(iter(chosen), params.get("quantizer"))


def _fields(place: Place, owner: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {place.named(f"{owner}.{field}"): value for field, value in config.items()}


def _for_all(name: str) -> str:
    """The parameter of all blocks together."""
    return name
