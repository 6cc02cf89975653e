"""What a layout costs, as a table: exact, a row a block, without building or allocating it.

Every figure comes from `Builder.costs`. What a preset's document states is kept in a column of its
own: a claim is never mixed with a count. This module imports no torch: what was described before
is shown without (`description_cache.py`).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from workbench import config as configs
from workbench.costs import Costs
from workbench.description_text import to_html, to_text
from workbench.layout import Block, Layout
from workbench.preset import Preset

if TYPE_CHECKING:
    import pandas as pd

    from workbench.builder import Builder, LayoutCosts
    from workbench.description_conditions import Conditions

STATED = "stated (claimed)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One block, or a part outside the blocks.

    Attributes:
        index: of the block, None outside the blocks.
        layer: the layer's name, or `embedding`, `final norm`, `head`.
        glyph: its character in the pattern.
        config: its Config, every field.
        key_config: the fields that set its size, or that differ from the default, for people.
        quantizer: name of what stores its weights, None for as they are.
        parameters: its layer's and its norm's, exactly.
        forward_flops: a token of a forward pass over the whole context, on average.
        decode_flops: one step after the whole context, one sequence.
        weight_bytes: as stored.
        state_bytes: of the batch after the whole context.
    """

    index: int | None
    layer: str
    glyph: str = ""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    key_config: str = ""
    quantizer: str | None = None
    parameters: int
    forward_flops: float = 0.0
    decode_flops: int = 0
    weight_bytes: int
    state_bytes: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """A layout with its exact costs; prints as a table, also in notebooks.

    Attributes:
        name: what was described, as it was given; empty for a Layout.
        layout: resolved.
        pattern: one glyph a block.
        context: tokens of a sequence at which FLOPs and state bytes are given.
        batch_size: sequences whose states are held; FLOPs are those of one.
        bytes_per_element: of weights that no quantizer stores, and of caches.
        blocks: a row a block, from the input up.
        outside: embedding, final norm and head.
        total: the sums; tied weights count once.
        active_parameters: those that one token uses (fewer in a mixture of experts).
        decode_state_bytes: state read and written by one decode step of the batch.
        preset: the preset, where it is one: its claim, source and assumptions.
        conditions_from: what set context, batch and bytes an element; empty for the defaults
            and what the caller gave.
    """

    name: str
    layout: Layout
    pattern: str
    context: int
    batch_size: int
    bytes_per_element: int
    blocks: tuple[Row, ...]
    outside: tuple[Row, ...]
    total: Row
    active_parameters: int
    decode_state_bytes: int
    preset: Preset | None = None
    conditions_from: str = ""

    @property
    def hash(self) -> str:
        """The layout's: equal for equal layouts."""
        return self.layout.hash

    @property
    def stated(self) -> dict[str, str | None] | None:
        """What the preset's document claims, None for no preset."""
        if self.preset is None:
            return None
        return {
            "parameters": self.preset.stated_parameters,
            "source": self.preset.source,
            "assumptions": self.preset.assumptions,
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON data: all rows unfolded, totals, layout, and the claim under `stated (claimed)`."""
        return {
            "name": self.name,
            "hash": self.hash,
            "pattern": self.pattern,
            "context": self.context,
            "batch_size": self.batch_size,
            "bytes_per_element": self.bytes_per_element,
            "conditions_from": self.conditions_from,
            "parameters": self.total.parameters,
            "active_parameters": self.active_parameters,
            "forward_flops_per_token": self.total.forward_flops,
            "decode_flops": self.total.decode_flops,
            "weight_bytes": self.total.weight_bytes,
            "state_bytes": self.total.state_bytes,
            "decode_state_bytes": self.decode_state_bytes,
            STATED: self.stated,
            "outside": [_row_data(row) for row in self.outside],
            "blocks": [_row_data(row) for row in self.blocks],
            "layout": self.layout.to_dict(),
        }

    def frame(self) -> pd.DataFrame:
        """A pandas row a block, indexed by block; figures as in `Row`."""
        import pandas as pd

        rows = [{**_row_data(row), "config": row.key_config} for row in self.blocks]
        return pd.DataFrame(rows).rename(columns={"index": "block"}).set_index("block")

    def __str__(self) -> str:
        return to_text(self)

    def _repr_html_(self) -> str:
        return to_html(self)


def describe_layout(
    builder: Builder,
    layout: Layout,
    conditions: Conditions,
    *,
    name: str = "",
    preset: Preset | None = None,
) -> Description:
    """The exact costs of a layout as a Description.

    Raises:
        UnknownNameError, FieldError: as `Builder.resolve`.
    """
    context, batch_size = conditions.context, conditions.batch_size
    bytes_per_element = conditions.bytes_per_element
    layout = builder.resolve(layout)
    costs = builder.costs(layout, length=context, bytes_per_element=bytes_per_element)
    per_token = costs.total.forward_flops / context
    assert costs.total.active_parameters is not None  # Costs fills it in
    return Description(
        name=name,
        layout=layout,
        pattern=builder.pattern(layout),
        context=context,
        batch_size=batch_size,
        bytes_per_element=bytes_per_element,
        conditions_from=conditions.origin,
        blocks=_block_rows(builder, layout, costs, batch_size),
        outside=_outside_rows(layout, costs, bytes_per_element),
        total=Row(
            index=None,
            layer="total",
            parameters=costs.total.parameters,
            forward_flops=per_token,
            decode_flops=costs.total.decode_flops,
            weight_bytes=costs.weight_bytes,
            state_bytes=costs.total.state_bytes * batch_size,
        ),
        active_parameters=costs.total.active_parameters,
        decode_state_bytes=costs.total.decode_state_bytes * batch_size,
        preset=preset,
    )


def _block_rows(
    builder: Builder, layout: Layout, costs: LayoutCosts, batch_size: int
) -> tuple[Row, ...]:
    rows = []
    for index, (block, part) in enumerate(zip(layout.blocks, costs.blocks, strict=True)):
        layer: Costs = part.costs
        rows.append(
            Row(
                index=index,
                layer=block.layer,
                glyph=builder.layers[block.layer].glyph,
                config=dict(block.config),
                key_config=_key_config(builder.layers[block.layer].Config, block),
                quantizer=None if block.quantizer is None else block.quantizer.name,
                parameters=layer.parameters + part.norm_parameters,
                forward_flops=layer.forward_flops / costs.length,
                decode_flops=layer.decode_flops,
                weight_bytes=part.weight_bytes,
                state_bytes=layer.state_bytes * batch_size,
            )
        )
    return tuple(rows)


def _outside_rows(
    layout: Layout, costs: LayoutCosts, bytes_per_element: int
) -> tuple[Row, Row, Row]:
    head_flops = 2 * layout.vocab_size * layout.d_model

    def row(layer: str, parameters: int, flops: int = 0) -> Row:
        return Row(
            index=None,
            layer=layer,
            parameters=parameters,
            forward_flops=float(flops),
            decode_flops=flops,
            weight_bytes=parameters * bytes_per_element,
        )

    head = "head (tied)" if layout.tie_embeddings else "head"
    return (
        row("embedding", costs.embedding),
        row("final norm", costs.norm),
        row(head, costs.head, head_flops),
    )


def _key_config(config_class: type, block: Block) -> str:
    """Searchable whole numbers and names, and whatever differs from its default."""
    searchable = {}
    keys = {}
    for name, field in configs.fields_of(config_class).items():
        value = block.config[name]
        if value is None:
            continue
        is_size = isinstance(value, int | str) and not isinstance(value, bool)
        if field.domain is not None:
            searchable[name] = value
        if (field.domain is not None and is_size) or field.required or value != field.default:
            keys[name] = value
    return ", ".join(f"{name}={_short(value)}" for name, value in (keys or searchable).items())


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_short, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _row_data(row: Row) -> dict[str, Any]:
    data = dataclasses.asdict(row)
    del data["key_config"]
    data["forward_flops_per_token"] = data.pop("forward_flops")
    return data
