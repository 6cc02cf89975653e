"""The search space: a study's `[space]` table plus declared Config ranges → Optuna → Layout.

    [space]
    d_model = [64, 96, 128]                     # a list is a choice,
    num_layers = {low = 4, high = 12, step = 2} # a table is a range, a scalar is fixed
    mixers = ["mamba2", "attention"]            # what placement policies may place
    placements = ["periodic", "sandwich"]
    mlps = ["swiglu", "none"]                   # after every mixer
    quantizers = ["none", "int8"]

    [space.layers.mamba2]
    d_state = [16, 32]
    headdim = "search"                          # the range that the layer's Config declares

Fields of layers and quantizers that are not named keep their defaults; fields of placement
policies that are not named are searched over the range they declare.

Neither torch nor Optuna is imported here: anything with Optuna's `suggest_*` methods will do.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from workbench import config as configs
from workbench.config import Choice, Domain, Mixer, PerLayer, Range
from workbench.errors import FieldError, UnknownNameError
from workbench.layout import Block, Layout, Named, canonical_json

if TYPE_CHECKING:
    from workbench.builder import Builder
    from workbench.registry import Registry

NONE = "none"
SEARCH = "search"


class Suggester(Protocol):
    """The part of `optuna.Trial` that a space needs."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int: ...
    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None, log: bool
    ) -> float: ...


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
    tie_embeddings: bool = True
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5


Fixed = tuple[Any]  # a one-tuple: a value that is not searched
Source = Domain | Fixed


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
            name: _source(getattr(config, name), int, None, f"space.{name}")
            for name in ("d_model", "num_layers")
        }
        for name, source in self._dims.items():
            _refuse_below_one(f"space.{name}", source)
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
            if len(set(names)) != len(names):
                raise FieldError(f"space.{field}", f"a name is there twice: {list(names)}")
            for name in names:
                if name == NONE and field in ("mlps", "quantizers"):
                    continue
                require(registry, name, f"space.{field}", self._offerable(field))
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
                source = _source(given[field.name], field.type, field.domain, here)
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
        return {
            **{name: _to_data(source) for name, source in self._dims.items()},
            "mixers": list(config.mixers),
            "placements": list(config.placements),
            "mlps": list(config.mlps),
            "quantizers": list(config.quantizers),
            "vocab_size": self.vocab_size,
            "tie_embeddings": config.tie_embeddings,
            "norm": config.norm,
            "norm_eps": config.norm_eps,
            **{
                table: {
                    name: {field: _to_data(source) for field, source in sources.items()}
                    for name, sources in things.items()
                }
                for table, things in tables.items()
            },
        }

    def suggest(self, trial: Suggester) -> Layout:
        """The layout that the trial's suggestions make, resolved.

        Raises:
            FieldError: these suggestions do not fit together; names the field.
        """
        d_model = _draw(trial, "d_model", self._dims["d_model"])
        num_layers = _draw(trial, "num_layers", self._dims["num_layers"])
        mixers = self._place(trial, num_layers)
        mlp = _choose(trial, "mlp", self.config.mlps)
        used = dict.fromkeys([*mixers, mlp])
        layers = {
            name: self._config(trial, name, self._layers[name]) for name in used if name != NONE
        }
        quantizer = self._quantizer(trial)
        block = {
            name: Block(layer=name, config=config, quantizer=quantizer)
            for name, config in layers.items()
        }
        layout = self._layout.replace(
            d_model=d_model,
            blocks=tuple(block[name] for mixer in mixers for name in (mixer, mlp) if name != NONE),
        )
        return self.builder.resolve(layout)

    def _place(self, trial: Suggester, num_layers: int) -> tuple[str, ...]:
        name = _choose(trial, "placement", self.config.placements)
        policy = self.builder.placements[name]
        data = self._config(trial, name, self._placements[name], num_layers)
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

    def _quantizer(self, trial: Suggester) -> Named | None:
        name = _choose(trial, "quantizer", self.config.quantizers)
        if name == NONE:
            return None
        return Named(name=name, config=self._config(trial, name, self._quantizers[name]))

    def _config(
        self, trial: Suggester, name: str, sources: Mapping[str, Source], num_layers: int = 0
    ) -> dict[str, Any]:
        values = {}
        for field, source in sources.items():
            if isinstance(source, PerLayer):
                values[field] = [
                    _draw(trial, f"{name}.{field}.{index}", source.inner)
                    for index in range(num_layers)
                ]
            else:
                values[field] = _draw(trial, f"{name}.{field}", source)
        return values


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


def _source(value: Any, expected: Any, declared: Domain | None, where: str) -> Source:
    """What a TOML value says of a field: a fixed value, a choice, a range, or the declared one."""
    if value == SEARCH and (declared is not None or expected is not str):
        if declared is None:
            raise FieldError(
                where,
                'declares no search range: give a list or {low = …, high = …} in place of "search"',
            )
        return declared
    if isinstance(value, Mapping):
        return _range(value, expected, where)
    if isinstance(value, list | tuple):
        try:
            # A field that holds a tuple takes a list as its value, not as choices.
            return (configs.coerce(value, expected, where),)
        except FieldError:
            return Choice(*(configs.coerce(item, expected, where) for item in value))
    return (configs.coerce(value, expected, where),)


def _range(table: Mapping[str, Any], expected: Any, where: str) -> Range:
    if not {"low", "high"} <= table.keys() <= {"low", "high", "step", "log"}:
        raise FieldError(where, f"a range has low, high and perhaps step or log, got {dict(table)}")
    types = {"low": expected, "high": expected, "step": expected, "log": bool}
    try:
        return Range(
            **{end: configs.coerce(value, types[end], end) for end, value in table.items()}
        )
    except FieldError as error:
        raise error.within(where) from None


def _refuse_below_one(where: str, source: Source) -> None:
    values: Any = source.values if isinstance(source, Choice) else source
    lowest = source.low if isinstance(source, Range) else min(values)
    if lowest < 1:
        raise FieldError(where, f"must be at least 1, got {lowest}")


def _choose(trial: Suggester, name: str, choices: tuple[str, ...]) -> str:
    return str(_draw(trial, name, Choice(*choices)))


def _draw(trial: Suggester, name: str, source: Any) -> Any:
    if isinstance(source, tuple):
        return source[0]
    if isinstance(source, Choice):
        if len(source.values) == 1:
            return source.values[0]
        return trial.suggest_categorical(name, list(source.values))
    low, high, step = source.low, source.high, source.step
    if isinstance(low, int) and isinstance(high, int) and (step is None or isinstance(step, int)):
        return trial.suggest_int(name, low, high, step=step or 1, log=source.log)
    return trial.suggest_float(name, low, high, step=step, log=source.log)


def _to_data(source: Source) -> Any:
    if isinstance(source, tuple):
        return source[0]
    if isinstance(source, Choice):
        return list(source.values)
    if isinstance(source, PerLayer):
        return {"per_layer": _to_data(source.inner)}
    return dataclasses.asdict(source)
