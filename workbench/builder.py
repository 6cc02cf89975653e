"""Builder: the registries that plugins fill, and Layout → HybridLM."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from workbench import config as configs
from workbench import linear_cross_entropy, linear_step  # noqa: F401 (they define operations)
from workbench.costs import Costs
from workbench.data import DataSource
from workbench.discovery import Plugins, discover, register_all
from workbench.errors import WorkbenchError
from workbench.exporter import Exporter
from workbench.layer import Layer
from workbench.layout import Block, Layout, Named
from workbench.metric import STAGES, Metric
from workbench.model import HybridLM, sources_of
from workbench.placement import Placement
from workbench.preset import Preset
from workbench.quantizer import QuantizationReport, Quantizer, num_bytes
from workbench.registry import Registry

Key = tuple[int, type[Layer], str, tuple[type[Quantizer], str] | None]  # `Builder._key`


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockCosts:
    """One row of `LayoutCosts`: a block, its layer's exact costs, its norm, its stored bytes."""

    layer: str
    costs: Costs
    norm_parameters: int
    weight_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayoutCosts:
    """Exact costs of a layout, from the input up.

    Attributes:
        embedding, head, norm: parameters outside the blocks (the head is 0 when tied).
        blocks: one row a block; shared weights count where they are first.
        total: everything together; `total.parameters` counts tied weights once.
        weight_bytes: weights as stored, quantized blocks at their stored size.
        length: context length that FLOPs and state bytes are given at.
    """

    embedding: int
    head: int
    norm: int
    blocks: tuple[BlockCosts, ...]
    total: Costs
    weight_bytes: int
    length: int


@dataclasses.dataclass(frozen=True)
class _Resolved:
    """The last layout that was resolved: the stages of a trial ask for it again and again."""

    given: Layout
    layout: Layout
    sources: list[int | None]
    keys: list[Key]


class Builder:
    """What is registered, and how a Layout becomes a model.

    Attributes:
        layers, placements, quantizers, metrics, data_sources, exporters, presets: registries.
        plugins: which plugins were found and which failed.
    """

    def __init__(self, plugins: Plugins) -> None:
        self.plugins = plugins
        failures = plugins.failures
        self.layers = Registry[type[Layer]]("layer", _check_layer, failures)
        self.placements = Registry[type[Placement]]("placement", _check(Placement), failures)
        self.quantizers = Registry[type[Quantizer]]("quantizer", _check(Quantizer), failures)
        self.metrics = Registry[type[Metric]]("metric", _check_metric, failures)
        self.data_sources = Registry[type[DataSource]]("data source", _check(DataSource), failures)
        self.exporters = Registry[type[Exporter]]("exporter", _check(Exporter), failures)
        self.presets = Registry[Preset]("preset", _check_preset, failures)
        register_all(plugins, self.registries())
        # A search meets few different blocks: what is known of one is kept.
        self._blocks: dict[Key, Block] = {}  # resolved, by what they were resolved from
        self._rows: dict[tuple[Key, bool, int, int, str], BlockCosts] = {}
        self._weight_bytes: dict[tuple[Key, bool, int], int] = {}
        self._last: _Resolved | None = None

    @classmethod
    def load(cls, plugin_dirs: Iterable[str | Path] = ()) -> Builder:
        """A builder with every installed plugin and those of the given folders."""
        return cls(discover(plugin_dirs))

    def registries(self) -> dict[str, Registry[Any]]:
        """The registries by hook suffix (`layers`, `placements`, …)."""
        return {
            "layers": self.layers,
            "placements": self.placements,
            "quantizers": self.quantizers,
            "metrics": self.metrics,
            "data_sources": self.data_sources,
            "exporters": self.exporters,
            "presets": self.presets,
        }

    # Layout → Layout

    def resolve(self, layout: Layout) -> Layout:
        """The layout with every name known, every default written out and every check passed.

        Raises:
            UnknownNameError, FieldError: with the block and the field to change.
        """
        return self._resolve(layout).layout

    def _resolve(self, layout: Layout) -> _Resolved:
        if self._last is not None and (layout is self._last.layout or layout is self._last.given):
            return self._last
        blocks = []
        for index, block in enumerate(layout.blocks):
            key = self._key(layout.d_model, block)
            if key not in self._blocks:
                where = f"blocks[{index}] ({block.layer})"
                self._blocks[key] = self._resolve_block(layout.d_model, block, where)
            blocks.append(self._blocks[key])
        resolved = layout.replace(blocks=tuple(blocks))
        self._last = _Resolved(
            given=layout,
            layout=resolved,
            sources=self.sources(resolved),
            keys=[self._key(layout.d_model, block) for block in blocks],
        )
        return self._last

    def _key(self, d_model: int, block: Block) -> Key:
        """Equal for blocks of equal width, layer, Config and quantizer; 1 is not 1.0."""
        stored = block.quantizer
        how = None if stored is None else (self.quantizers[stored.name], repr(stored.config))
        return d_model, self.layers[block.layer], repr(block.config), how

    def _resolve_block(self, d_model: int, block: Block, where: str) -> Block:
        layer = self.layers[block.layer]
        config = _located(where, configs.from_dict, layer.Config, block.config)
        _located(where, layer.check, d_model, config)
        return Block(
            layer=block.layer,
            config=configs.to_dict(config),
            quantizer=self._resolve_quantizer(block.quantizer, where),
        )

    def sources(self, layout: Layout) -> list[int | None]:
        """For each block of a resolved layout the earlier one that it builds on, or None.

        Raises:
            FieldError: a block's source is missing or does not fit.
        """
        return sources_of(layout, [self.layers[block.layer] for block in layout.blocks])

    def _resolve_quantizer(self, quantizer: Named | None, where: str) -> Named | None:
        if quantizer is None:
            return None
        config_class = self.quantizers[quantizer.name].Config
        config = _located(f"{where}.quantizer", configs.from_dict, config_class, quantizer.config)
        return Named(name=quantizer.name, config=configs.to_dict(config))

    def pattern(self, layout: Layout) -> str:
        """One glyph a block, from the input up."""
        return layout.pattern({name: self.layers[name].glyph for name in self.layers})

    # Layout → HybridLM

    def build(
        self,
        layout: Layout,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> HybridLM:
        """A freshly initialised model, its blocks not quantized (see `quantize`).

        Args:
            device: `"meta"` allocates nothing and initialises nothing.
            seed: of the initial weights; torch's global generator is left untouched.

        Raises:
            UnknownNameError, FieldError: as `resolve`.
        """
        layout = self.resolve(layout)
        device = torch.device(device)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        # Constructors draw, too: torch's linears initialise themselves before the model does.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            layers = [self._layer(layout.d_model, block, **factory) for block in layout.blocks]
            model = HybridLM(layout, layers, **factory)
            if device.type != "meta":
                torch.manual_seed(seed)
                model.reset_parameters()
        return model

    def _layer(self, d_model: int, block: Block, **factory: Any) -> Layer:
        layer = self.layers[block.layer]
        return layer(d_model, configs.from_dict(layer.Config, block.config), **factory)

    def quantize(self, model: HybridLM) -> list[QuantizationReport | None]:
        """Store the weights of each block as its layout says, in place; a report a block."""
        reports: list[QuantizationReport | None] = []
        for block, layer in zip(model.layout.blocks, model.layers, strict=True):
            reports.append(None if block.quantizer is None else self._quantize(block, layer))
        model.tie_weights()
        return reports

    def _quantize(self, block: Block, layer: Layer) -> QuantizationReport:
        assert block.quantizer is not None
        quantizer = self.quantizers[block.quantizer.name]
        config: Any = configs.from_dict(quantizer.Config, block.quantizer.config)
        return quantizer.quantize(layer, config)

    # Layout → figures

    def costs(self, layout: Layout, *, length: int, bytes_per_element: int = 4) -> LayoutCosts:
        """Exact costs at a context of `length` tokens, one sequence; allocates nothing.

        Args:
            bytes_per_element: of weights that no quantizer stores, activations and caches.
        """
        known = self._resolve(layout)
        layout = known.layout
        norm = layout.d_model * (1 if layout.norm == "rmsnorm" else 2)
        rows = []
        for block, own_key, source in zip(layout.blocks, known.keys, known.sources, strict=True):
            is_shared = source is not None and bool(self.layers[block.layer].shared)
            own = (own_key, is_shared, length, bytes_per_element)
            key = (*own, layout.norm)
            if key not in self._rows:
                self._rows[key] = self._row(layout, block, norm, *own)
            rows.append(self._rows[key])
        return _total(layout, norm, tuple(rows), length, bytes_per_element)

    def _row(
        self,
        layout: Layout,
        block: Block,
        norm: int,
        key: Key,
        is_shared: bool,
        length: int,
        bytes_per_element: int,
    ) -> BlockCosts:
        """The costs of one block.

        Args:
            norm: parameters of a norm.
            is_shared: whether an earlier block holds the weights that it may share.
        """
        layer = self.layers[block.layer]
        config: Any = configs.from_dict(layer.Config, block.config)
        costs = layer.costs(
            layout.d_model, config, length=length, bytes_per_element=bytes_per_element
        )
        if is_shared:
            own: Any = costs.own_parameters
            costs = dataclasses.replace(costs, parameters=own, active_parameters=own)
        shared = layer.shared if is_shared else ()
        stored = self._block_bytes(layout.d_model, block, key, shared, costs, bytes_per_element)
        block_norm = norm if layer.pre_norm else 0
        return BlockCosts(
            layer=block.layer,
            costs=costs,
            norm_parameters=block_norm,
            weight_bytes=stored + block_norm * bytes_per_element,
        )

    def _block_bytes(
        self,
        d_model: int,
        block: Block,
        block_key: Key,
        shared: Sequence[str],
        costs: Costs,
        bytes_per_element: int,
    ) -> int:
        """Bytes of a block's weights as stored, without the `shared` ones, which another holds."""
        if block.quantizer is None:
            return costs.parameters * bytes_per_element
        key = (block_key, bool(shared), bytes_per_element)
        if key not in self._weight_bytes:
            dtype = {8: torch.float64, 4: torch.float32, 2: torch.bfloat16}[bytes_per_element]
            layer = self._layer(d_model, block, device=torch.device("meta"), dtype=dtype)
            self._quantize(block, layer)
            for name in shared:
                delattr(layer, name)
            self._weight_bytes[key] = num_bytes(layer)
        return self._weight_bytes[key]


def _total(
    layout: Layout, norm: int, rows: tuple[BlockCosts, ...], length: int, bytes_per_element: int
) -> LayoutCosts:
    embedding = layout.vocab_size * layout.d_model
    head = 0 if layout.tie_embeddings else embedding
    outside = embedding + head + norm
    head_flops = 2 * layout.vocab_size * layout.d_model
    total = Costs(
        parameters=outside,
        forward_flops=head_flops * length,
        decode_flops=head_flops,
    )
    norms = Costs(parameters=sum(row.norm_parameters for row in rows))
    total = Costs.sum([total, *(row.costs for row in rows), norms])
    return LayoutCosts(
        embedding=embedding,
        head=head,
        norm=norm,
        blocks=rows,
        total=total,
        weight_bytes=outside * bytes_per_element + sum(row.weight_bytes for row in rows),
        length=length,
    )


def _located(where: str, function: Any, *arguments: Any) -> Any:
    """Call `function`; an error of the user's names where in the layout it lies."""
    try:
        return function(*arguments)
    except WorkbenchError as error:
        raise error.within(where) from None


def _check(base: type) -> Any:
    def check(thing: Any) -> None:
        if not (isinstance(thing, type) and issubclass(thing, base)):
            raise TypeError(f"register a subclass of workbench.{base.__name__}, not {thing!r}")
        configs.fields_of(thing.Config)  # type: ignore[attr-defined]
        missing: frozenset[str] = getattr(thing, "__abstractmethods__", frozenset())
        if missing:
            raise TypeError(f"{thing.__qualname__} lacks {', '.join(sorted(missing))}")

    return check


def _check_layer(thing: Any) -> None:
    _check(Layer)(thing)
    if thing.kind not in ("attention", "recurrent", "mlp"):
        raise TypeError(
            f"{thing.__qualname__}.kind is {thing.kind!r}: use 'attention', 'recurrent' or 'mlp'"
        )
    if len(thing.glyph) != 1:
        raise TypeError(f"{thing.__qualname__}.glyph is {thing.glyph!r}: use one character")


def _check_metric(thing: Any) -> None:
    _check(Metric)(thing)
    if getattr(thing, "stage", None) not in STAGES:
        raise TypeError(f"{thing.__qualname__}.stage must be one of {', '.join(STAGES)}")
    if thing.direction not in ("minimize", "maximize"):
        raise TypeError(f"{thing.__qualname__}.direction must be 'minimize' or 'maximize'")


def _check_preset(thing: Any) -> None:
    if not isinstance(thing, Preset):
        raise TypeError(f"register a workbench.Preset, not {thing!r}")


@lru_cache(maxsize=8)
def default_builder(plugin_dirs: tuple[str, ...] = ()) -> Builder:
    """The builder that the command line and `import workbench` use, loaded once a process."""
    return Builder.load(plugin_dirs)
