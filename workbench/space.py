"""The search space: a study's `[space]` table plus declared Config ranges → Optuna → Layout.

    [space]
    d_model = [64, 96, 128]                     # a list is a choice,
    num_layers = {low = 4, high = 12, step = 2} # a table is a range, a scalar is fixed
    mixers = ["mamba2", "attention"]            # what placement policies may place
    placements = ["periodic", "sandwich"]
    mlps = ["swiglu", "none"]                   # after every mixer
    quantizers = ["none", "int8"]
    per_block = ["quantizer"]                   # each block its own: also "mlp", "layers"

    [space.layers.mamba2]
    d_state = [16, 32]
    headdim = "search"                          # the range that the layer's Config declares

Fields of layers and quantizers that are not named keep their defaults; fields of placement
policies that are not named are searched over the range they declare.

A parameter is named after its field (`mamba2.d_state`), one of a single block after its layer too
(`mamba2.d_state.3`; `space_blocks` has them all). Neither torch nor Optuna is imported here:
anything with Optuna's `suggest_*` methods will do.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from workbench import config as configs
from workbench.config import Choice, Mixer, PerLayer
from workbench.errors import FieldError, UnknownNameError
from workbench.layout import Layout, canonical_json
from workbench.space_blocks import NONE as NONE
from workbench.space_blocks import PER_BLOCK, BlockChoices
from workbench.space_sources import (
    Source,
    Suggester,
    choose,
    draw,
    draw_config,
    read_source,
    refuse_below_one,
    to_data,
)

if TYPE_CHECKING:
    from workbench.builder import Builder
    from workbench.registry import Registry


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpaceConfig:
    """The `[space]` table of a study, as plain data.

    Attributes:
        d_model, num_layers: residual width and number of mixers: a scalar, list or range.
        mixers: layers that placement policies may place.
        placements: placement policies to choose from.
        mlps: what follows every mixer; `"none"` for nothing.
        quantizers: how weights are stored; `"none"` for as trained.
        layers, placement, quantizer: overrides of Config fields, by name.
        per_block: what each block chooses on its own: `"quantizer"`, `"mlp"`, `"layers"`.
        tie_embeddings, norm, norm_eps: as in Layout.
    """

    d_model: Any
    num_layers: Any
    mixers: tuple[str, ...]
    placements: tuple[str, ...]
    mlps: tuple[str, ...] = (NONE,)
    quantizers: tuple[str, ...] = (NONE,)
    layers: dict[str, Any] = dataclasses.field(default_factory=dict)
    placement: dict[str, Any] = dataclasses.field(default_factory=dict)
    quantizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    per_block: tuple[str, ...] = ()
    tie_embeddings: bool = True
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5


class Space:
    """Turns suggestions into Layouts.

    Args:
        config: the `[space]` table.
        builder: knows the layers, policies and quantizers.
        vocab_size: of the study's data.

    Raises:
        UnknownNameError, FieldError: a name or field that does not exist, a domain that cannot be
            searched, or a policy for which no mixer is offered. Raised before any trial.
    """

    def __init__(self, config: SpaceConfig, builder: Builder, vocab_size: int) -> None:
        self.config = config
        self.builder = builder
        self.vocab_size = vocab_size
        self._check_names()
        self._dims = {
            name: read_source(getattr(config, name), int, None, f"space.{name}")
            for name in ("d_model", "num_layers")
        }
        for name, source in self._dims.items():
            refuse_below_one(f"space.{name}", source)
        # Everything but width and blocks, checked once.
        self._layout = Layout.from_dict(
            {
                "d_model": 1,
                "vocab_size": vocab_size,
                "blocks": [{"layer": config.mixers[0]}],
                "tie_embeddings": config.tie_embeddings,
                "norm": config.norm,
                "norm_eps": config.norm_eps,
            }
        )
        offered = [name for name in (*config.mixers, *config.mlps) if name != NONE]
        self._layers = {
            name: self._sources(builder.layers, name, config.layers, "layers", searched=False)
            for name in offered
        }
        self._placements = {
            name: self._sources(
                builder.placements, name, config.placement, "placement", searched=True
            )
            for name in config.placements
        }
        self._quantizers = {
            name: self._sources(
                builder.quantizers, name, config.quantizer, "quantizer", searched=False
            )
            for name in config.quantizers
            if name != NONE
        }
        self._blocks = BlockChoices(
            mixers=config.mixers,
            mlps=config.mlps,
            quantizers=config.quantizers,
            layer_fields=self._layers,
            quantizer_fields=self._quantizers,
            per_block=config.per_block,
        )

    def _check_names(self) -> None:
        config = self.config
        registries: dict[str, tuple[Registry[Any], tuple[str, ...]]] = {
            "mixers": (self.builder.layers, config.mixers),
            "mlps": (self.builder.layers, config.mlps),
            "placements": (self.builder.placements, config.placements),
            "quantizers": (self.builder.quantizers, config.quantizers),
        }
        for field, (registry, names) in registries.items():
            if not names:
                raise FieldError(f"space.{field}", "name at least one")
            _refuse_twice(field, names)
            for name in names:
                if name == NONE and field in ("mlps", "quantizers"):
                    continue
                require(registry, name, f"space.{field}", self._offerable(field))
        _refuse_twice("per_block", config.per_block)
        for name in config.per_block:
            if name not in PER_BLOCK:
                raise UnknownNameError("name in space.per_block", name, PER_BLOCK)
        for name in config.mixers:
            if self.builder.layers[name].kind == "mlp":
                raise FieldError("space.mixers", f"{name!r} is an MLP: list it under space.mlps")
        for table, known in (
            ("layers", {*config.mixers, *config.mlps} - {NONE}),
            ("placement", set(config.placements)),
            ("quantizer", set(config.quantizers) - {NONE}),
        ):
            for name in getattr(config, table):
                if name not in known:
                    raise UnknownNameError(f"name under [space.{table}]", name, known)

    def _offerable(self, field: str) -> list[str]:
        """What a list of names may hold."""
        if field == "placements":
            return list(self.builder.placements)
        if field == "quantizers":
            return [*self.builder.quantizers, NONE]
        layers = self.builder.layers
        kept = [name for name in layers if (layers[name].kind == "mlp") == (field == "mlps")]
        return [*kept, NONE] if field == "mlps" else kept

    def _sources(
        self,
        registry: Registry[Any],
        name: str,
        overrides: Mapping[str, Any],
        table: str,
        *,
        searched: bool,
    ) -> dict[str, Source]:
        """Where each Config field of one thing gets its value."""
        declared = configs.fields_of(registry[name].Config)
        given = overrides.get(name, {})
        where = f"space.{table}.{name}"
        if not isinstance(given, Mapping):
            raise FieldError(where, f"expected a table of fields, got {given!r}")
        for field_name in given:
            if field_name not in declared:
                raise UnknownNameError(f"field of {where}", field_name, declared)
        sources: dict[str, Source] = {}
        for field in declared.values():
            here = f"{where}.{field.name}"
            if field.name in given:
                source = read_source(given[field.name], field.type, field.domain, here)
            elif field.domain is not None and (searched or field.required):
                source = field.domain
            elif field.required:
                raise FieldError(here, "has no default and no range: give it a value here")
            else:
                continue
            sources[field.name] = self._offer_mixers(source, here)
        return sources

    def _offer_mixers(self, source: Source, where: str) -> Source:
        """The source with `Mixer` replaced by the names that the study offers."""
        if isinstance(source, PerLayer):
            inner = self._offer_mixers(source.inner, where)
            assert not isinstance(inner, tuple | PerLayer)
            return PerLayer(inner)
        if not isinstance(source, Mixer):
            return source
        names = [
            name
            for name in self.config.mixers
            if source.kind is None or self.builder.layers[name].kind == source.kind
        ]
        if not names:
            raise FieldError(
                where,
                f"needs a mixer of kind {source.kind!r}, and space.mixers offers none "
                f"({', '.join(self.config.mixers)}). Offer one, or name the mixers here.",
            )
        return Choice(*names)

    @property
    def fingerprint(self) -> str:
        """12 hex digits: equal for spaces with the same parameters, ranges and choices."""
        return hashlib.sha256(canonical_json(self.to_dict()).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Every parameter with its range, as JSON data: what the fingerprint is made of."""
        config = self.config
        tables = {"layers": self._layers, "placement": self._placements}
        tables["quantizer"] = self._quantizers
        # Absent where it is empty: a study from before there was a choice a block goes on.
        chosen = [name for name in PER_BLOCK if name in config.per_block]
        return {
            **{name: to_data(source) for name, source in self._dims.items()},
            "mixers": list(config.mixers),
            "placements": list(config.placements),
            "mlps": list(config.mlps),
            "quantizers": list(config.quantizers),
            "vocab_size": self.vocab_size,
            "tie_embeddings": config.tie_embeddings,
            "norm": config.norm,
            "norm_eps": config.norm_eps,
            **({"per_block": chosen} if chosen else {}),
            **{
                table: {
                    name: {field: to_data(source) for field, source in sources.items()}
                    for name, sources in things.items()
                }
                for table, things in tables.items()
            },
        }

    def read(self, layout: Layout) -> Iterator[dict[str, Any]]:
        """The parameters of single blocks that make a resolved layout (`BlockChoices.read`)."""
        return self._blocks.read(layout.blocks)

    def suggest(self, trial: Suggester) -> Layout:
        """The layout that the trial's suggestions make, resolved.

        Raises:
            FieldError: these suggestions do not fit together; names the field.
        """
        d_model = draw(trial, "d_model", self._dims["d_model"])
        num_layers = draw(trial, "num_layers", self._dims["num_layers"])
        mixers = self._place(trial, num_layers)
        layout = self._layout.replace(d_model=d_model, blocks=self._blocks.draw(trial, mixers))
        return self.builder.resolve(layout)

    def _place(self, trial: Suggester, num_layers: int) -> tuple[str, ...]:
        name = choose(trial, "placement", self.config.placements)
        policy = self.builder.placements[name]
        fields = self._placements[name]
        data = draw_config(trial, fields, lambda field: f"{name}.{field}", num_layers)
        try:
            config: Any = configs.from_dict(policy.Config, data)
            placed = policy.place(num_layers, self.config.mixers, config)
        except FieldError as error:
            raise error.within(name) from None
        strangers = set(placed) - set(self.config.mixers)
        if len(placed) != num_layers or strangers:
            raise FieldError(
                name,
                f"placed {list(placed)}: it owes {num_layers} names out of "
                f"{list(self.config.mixers)}",
            )
        return placed


def _refuse_twice(field: str, names: tuple[str, ...]) -> None:
    if len(set(names)) != len(names):
        raise FieldError(f"space.{field}", f"a name is there twice: {list(names)}")


def require(registry: Registry[Any], name: str, where: str, known: Iterable[str] = ()) -> None:
    """Raise UnknownNameError, naming the study's field `where`, unless the registry has `name`.

    Args:
        known: what the field may hold, if not everything that is registered.
    """
    try:
        registry[name]
    except UnknownNameError as error:
        kind = f"{error.kind} in {where}"
        raise UnknownNameError(kind, name, known or error.known, error.hint) from None
