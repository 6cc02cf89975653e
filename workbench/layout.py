"""Layout and Block: a hybrid language model as plain data, frozen, with JSON both ways.

A Layout is what a search suggests, a builder builds, a record keeps, a preset names and an export
carries. It knows nothing of torch and nothing of what the named layers are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from workbench.config import coerce
from workbench.errors import FieldError, UnknownNameError, WorkbenchError

FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Named:
    """A plugin's thing by name with the values of its Config (JSON scalars and lists)."""

    name: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((self.name, canonical_json(self.config)))

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "config": dict(self.config)}

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Named:
        data = _mapping(data, where, {"name", "config"})
        return cls(
            name=_required(data, "name", str, where),
            config=dict(_mapping(data.get("config", {}), f"{where}.config")),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """One residual block, `x + layer(norm(x))`.

    Attributes:
        layer: name of a registered layer; an MLP is a layer like any other.
        config: that layer's Config as plain data; absent fields take their defaults.
        quantizer: how the layer's weights are stored, None for as they are.
    """

    layer: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    quantizer: Named | None = None

    def __hash__(self) -> int:
        return hash((self.layer, canonical_json(self.config), self.quantizer))

    @cached_property
    def canonical(self) -> str:
        """Its canonical JSON."""
        return canonical_json(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {"layer": self.layer, "config": dict(self.config)}
        if self.quantizer is not None:
            data["quantizer"] = self.quantizer.to_dict()
        return data

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Block:
        data = _mapping(data, where, {"layer", "config", "quantizer"})
        quantizer = data.get("quantizer")
        return cls(
            layer=_required(data, "layer", str, where),
            config=dict(_mapping(data.get("config", {}), f"{where}.config")),
            quantizer=None
            if quantizer is None
            else Named.from_dict(quantizer, f"{where}.quantizer"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """A whole model as data: width, vocabulary, norms, and a flat sequence of Blocks.

    Attributes:
        d_model: residual width.
        vocab_size: rows of the embedding.
        blocks: from the input up.
        tie_embeddings: the head shares the embedding's weights.
        norm: before every block and before the head.
        norm_eps: added to the mean square (or variance) in every norm.
        prefix_lm: made for prefixes that attention sees in both directions; without it a model
            refuses `Context.prefix_lengths_B`.
        embedding_multiplier: on the embedding's output (Granite, Falcon-H1).
        residual_multiplier: on every block's output before it is added (Granite).
        logits_scaling: logits are divided by it (Granite).
    """

    d_model: int
    vocab_size: int
    blocks: tuple[Block, ...]
    tie_embeddings: bool = True
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    prefix_lm: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0

    def __post_init__(self) -> None:
        for name in ("d_model", "vocab_size"):
            if getattr(self, name) < 1:
                raise FieldError(name, f"must be at least 1, got {getattr(self, name)}")
        for name in ("norm_eps", "embedding_multiplier", "residual_multiplier", "logits_scaling"):
            # 1 and 1.0 are equal but not in JSON, and equal layouts have equal hashes.
            object.__setattr__(self, name, coerce(getattr(self, name), float, name))
        if not self.blocks:
            raise FieldError("blocks", "a layout needs at least one block")
        if self.norm_eps <= 0:
            raise FieldError("norm_eps", f"must be above 0, got {self.norm_eps}")
        if self.logits_scaling == 0:
            raise FieldError("logits_scaling", "must not be 0")

    @cached_property
    def hash(self) -> str:
        """12 hex digits of the canonical JSON: equal layouts, equal hashes, on any machine."""
        blocks = ",".join([block.canonical for block in self.blocks])
        rest = canonical_json({**self._own(), "format": FORMAT})
        text = f'{{"blocks":[{blocks}],{rest[1:]}'  # "blocks" sorts before all others
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def _own(self) -> dict[str, Any]:
        """Every field but the blocks."""
        return {name: getattr(self, name) for name in FIELDS}

    def replace(self, **changes: Any) -> Layout:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def pattern(self, glyphs: Mapping[str, str]) -> str:
        """One glyph a block (`M-M-A-`); a layer without a glyph is `?`."""
        return "".join(glyphs.get(block.layer, "?") for block in self.blocks)

    def to_dict(self) -> dict[str, Any]:
        """JSON data, every field present."""
        data: dict[str, Any] = {"format": FORMAT}
        for field in dataclasses.fields(self):
            data[field.name] = getattr(self, field.name)
        data["blocks"] = [block.to_dict() for block in self.blocks]
        return data

    def to_json(self) -> str:
        """Indented JSON text, as files hold it."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, data: Any) -> Layout:
        """The layout that `to_dict` gave.

        Raises:
            FieldError, UnknownNameError: a field that is missing, malformed or not known.
            WorkbenchError: a format that this version cannot read.
        """
        data = dict(_mapping(data, "layout"))
        version = data.pop("format", FORMAT)
        # Before the fields: another format may have others.
        if version != FORMAT:
            raise WorkbenchError(
                f"layout format {version!r} cannot be read: this workbench reads format {FORMAT}."
            )
        _mapping(data, "layout", {field.name for field in dataclasses.fields(cls)})
        blocks = _required(data, "blocks", list, "layout")
        types = {"d_model": int, "vocab_size": int, "tie_embeddings": bool, "prefix_lm": bool}
        values: dict[str, Any] = {
            "blocks": tuple(
                Block.from_dict(block, f"blocks[{i}]") for i, block in enumerate(blocks)
            )
        }
        for name in ("d_model", "vocab_size"):
            _required(data, name, int, "layout")
        for name, value in data.items():
            if name == "norm":
                values[name] = coerce(value, Literal["rmsnorm", "layernorm"], name)
            elif name != "blocks":
                values[name] = coerce(value, types.get(name, float), name)
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """The layout in a JSON text.

        Raises:
            WorkbenchError: not JSON, or not a layout; says where.
        """
        try:
            data = json.loads(text, parse_constant=_refuse_constant)
        except json.JSONDecodeError as error:
            raise WorkbenchError(
                f"not JSON at line {error.lineno}, column {error.colno}: {error.msg}"
            ) from None
        except (ValueError, RecursionError) as error:  # too many digits, too deep
            raise WorkbenchError(f"not a layout: {error}") from None
        return cls.from_dict(data)

    @classmethod
    def read(cls, path: str | Path) -> Layout:
        """The layout in a JSON file.

        Raises:
            WorkbenchError: the file cannot be read or holds no layout; names the file.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise WorkbenchError(f"cannot read the layout file {path}: {error}") from None
        except WorkbenchError as error:
            raise WorkbenchError(f"{path}: {error}") from None


FIELDS = tuple(field.name for field in dataclasses.fields(Layout) if field.name != "blocks")


def canonical_json(data: Any) -> str:
    """JSON text that is the same for equal data: sorted keys, no spaces."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _refuse_constant(name: str) -> None:
    raise WorkbenchError(f"{name} is no JSON number: use a finite one")


def _mapping(data: Any, where: str, known: Iterable[str] | None = None) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise FieldError(where, f"expected an object, got {type(data).__name__}")
    if known is not None:
        for name in data:
            if name not in known:
                raise UnknownNameError(f"field of {where}", str(name), known)
    return data


def _required(data: Mapping[str, Any], name: str, expected: type, where: str) -> Any:
    if name not in data:
        raise FieldError(f"{where}.{name}", "is required")
    value = data[name]
    if type(value) is not expected:
        raise FieldError(f"{where}.{name}", f"expected {expected.__name__}, got {value!r}")
    return value
