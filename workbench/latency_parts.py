"""What a layout's latency is the sum of: its blocks one by one, and what is outside them.

A part is named by canonical JSON: a block by its layer, its Config with every default written out,
its quantizer, the frame around it (width, norm, residual multiplier) and the blocks that it builds
on; the outside by width, vocabulary and norm. Equal parts, equal text, on any machine.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from workbench.builder import Builder
from workbench.errors import WorkbenchError
from workbench.layer import Layer
from workbench.layout import Block, Layout, canonical_json
from workbench.model import HybridLM

Part = str
OUTSIDE = "outside"
STACK_VOCABULARY = 256  # of the models that blocks are timed in


class LinkedCopiesError(WorkbenchError):
    """A block that cannot be timed among copies of itself: they would build on one another."""


class Parts:
    """Takes layouts apart.

    Args:
        builder: knows the layers.
    """

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self._linked: dict[str, bool] = {}
        self._sources: dict[Part, str] = {}

    def of(self, layout: Layout) -> list[Part]:
        """The outside's part, then one a block, from the input up.

        Raises:
            UnknownNameError, FieldError: as `Builder.resolve`.
        """
        layout = self.builder.resolve(layout)
        return [outside_part(layout), *self._blocks(layout, self.builder.sources(layout))]

    def _blocks(self, layout: Layout, sources: list[int | None]) -> list[Part]:
        parts: list[Part] = []
        for block, source in zip(layout.blocks, sources, strict=True):
            after = [] if source is None else _chain(parts[source])
            parts.append(_block_part(layout, block, after))
        return parts

    def alone(self, layout: Layout, block: Block) -> Part:
        """The part of one block that builds on no other.

        Raises:
            UnknownNameError, FieldError: as `Builder.resolve`.
        """
        (resolved,) = self.builder.resolve(layout.replace(blocks=(block,))).blocks
        return _block_part(layout, resolved, [])

    def linked(self, layer: str) -> bool:
        """Whether blocks of a layer may build on earlier ones."""
        if layer not in self._linked:
            method: Any = self.builder.layers[layer].source
            self._linked[layer] = method.__func__ is not Layer.source.__func__  # type: ignore[attr-defined]
        return self._linked[layer]

    def sources(self, part: Part) -> str:
        """Versions and digests of the plugins that a part's code comes from."""
        if part not in self._sources:
            names: dict[str, None] = {}
            for block in _chain(part):
                names[str(self.builder.layers.provenance(block["layer"]))] = None
                if "quantizer" in block:
                    name = block["quantizer"]["name"]
                    names[str(self.builder.quantizers.provenance(name))] = None
            self._sources[part] = ", ".join(names)
        return self._sources[part]

    def layout_sources(self, layout: Layout) -> str:
        """`sources` of all blocks of a layout; empty where it cannot be built any more."""
        try:
            return "; ".join(sorted({self.sources(part) for part in self.of(layout)[1:]}))
        except WorkbenchError:
            return ""

    def model(self, part: Part, copies: int, **factory: Any) -> HybridLM:
        """A model of some copies of a block's part on what it builds on, stored as it says; or of
        no block at all, for the outside's part.

        Args:
            factory: device and dtype.

        Raises:
            LinkedCopiesError: copies build on one another, as the part's own block does not.
        """
        before = _chain(part)[:-1]
        if not before and (copies == 0 or group(part) == OUTSIDE):
            return _bare_model(part, **factory)
        layout = self.stack(part, copies)
        model = self.builder.build(layout, **factory)
        self.builder.quantize(model)
        return model

    def stack(self, part: Part, copies: int) -> Layout:
        """The layout of such a model; at least one block.

        Raises:
            LinkedCopiesError: as `model`.
        """
        data = json.loads(part)
        *before, block = [Block.from_dict(block, "block") for block in _chain(part)]
        layout = self.builder.resolve(
            Layout(
                d_model=data["d_model"],
                vocab_size=STACK_VOCABULARY,
                norm=data["norm"],
                residual_multiplier=data["residual_multiplier"],
                blocks=(*before, *(block,) * copies),
            )
        )
        parts = self._blocks(layout, self.builder.sources(layout))
        if set(parts[len(before) :]) - {part}:
            raise LinkedCopiesError(f"copies of {label(part)} build on one another")
        return layout


def outside_part(layout: Layout) -> Part:
    """Embedding, final norm and head of a layout."""
    return canonical_json(
        {
            "kind": OUTSIDE,
            "d_model": layout.d_model,
            "vocab_size": layout.vocab_size,
            "norm": layout.norm,
        }
    )


def label(part: Part) -> str:
    """A part in words, for people: what differs between parts of one search."""
    data = json.loads(part)
    if data["kind"] == OUTSIDE:
        return f"outside the blocks, d_model {data['d_model']}, vocabulary {data['vocab_size']}"
    block = data["block"]
    config = ", ".join(f"{name}={value}" for name, value in block["config"].items())
    stored = f", {block['quantizer']['name']}" if "quantizer" in block else ""
    on = f", on {' → '.join(b['layer'] for b in data['after'])}" if data["after"] else ""
    return f"{block['layer']}({config}){stored}, d_model {data['d_model']}{on}"


def group(part: Part) -> str:
    """What shares one correction: a layer's name, or `"outside"`."""
    data = json.loads(part)
    return OUTSIDE if data["kind"] == OUTSIDE else str(data["block"]["layer"])


def _bare_model(part: Part, **factory: Any) -> HybridLM:
    """A model without any block, of random weights."""
    data = json.loads(part)
    layout = Layout(
        d_model=data["d_model"],
        vocab_size=data.get("vocab_size", STACK_VOCABULARY),
        norm=data["norm"],
        blocks=(Block(layer="none"),),  # a Layout has one; this model has not
    )
    device = torch.device(factory["device"])
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        return HybridLM(layout, [], **factory)


def _block_part(layout: Layout, block: Block, after: list[dict[str, Any]]) -> Part:
    return canonical_json(
        {
            "kind": "block",
            "block": block.to_dict(),
            "d_model": layout.d_model,
            "norm": layout.norm,
            "residual_multiplier": layout.residual_multiplier,
            "after": after,
        }
    )


def _chain(part: Part) -> list[dict[str, Any]]:
    """The blocks that a part builds on, the first first, and its own; none for the outside."""
    data = json.loads(part)
    return [] if data["kind"] == OUTSIDE else [*data["after"], data["block"]]
