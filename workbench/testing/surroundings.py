"""What a layer needs around it to be tested: an earlier block to build on, or a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from workbench import config as configs
from workbench.builder import Builder
from workbench.errors import FieldError, WorkbenchError
from workbench.layer import PLAIN, Layer
from workbench.layout import Block
from workbench.testing.derived import UnderivableError


class Surroundings:
    """Finds out what a registered layer builds on (`Layer.source`), and whether it runs alone."""

    def __init__(self, name: str, layer: type[Layer], builder: Builder, d_model: int) -> None:
        self.name = name
        self.layer = layer
        self.builder = builder
        self.d_model = d_model
        self._needs_model: bool | None = None

    def attributes(self, found: Sequence[Any]) -> dict[str, Any]:
        """What a suite of the layer with these configs must set.

        Raises:
            UnderivableError: it needs an earlier block, and no installed layer will do.
        """
        possible = self.possible(found)
        return {
            "name": self.name,
            "configs": possible,
            "earlier": lambda suite, config: self.earlier(config),
            # Runs the layer, which may end the process: in a check, where that is its failure.
            "in_model": property(lambda suite: self.needs_model(possible[0])),
        }

    def needs_model(self, config: Any) -> bool:
        """Whether the layer runs neither on an earlier block nor alone; found out once."""
        if self._needs_model is None:
            self._needs_model = not (self.earlier(config) or self.runs_alone(config))
        return self._needs_model

    def possible(self, found: Sequence[Any]) -> list[Any]:
        """Those of the configs for which there is something to build on, if that is needed.

        Raises:
            UnderivableError: there are none.
        """
        kept, refusal = [], None
        for config in found:
            try:
                self.earlier(config)
            except UnderivableError as error:
                refusal = error
            else:
                kept.append(config)
        if refusal is not None and not kept:
            raise refusal
        return kept

    def earlier(self, config: Any) -> list[tuple[str, type[Layer], Any]]:
        """Name, class and Config of the block before: nothing, the layer itself, or another.

        Another has the values of the fields that both have, and its defaults elsewhere.

        Raises:
            UnderivableError: it needs an earlier block, and no installed layer will do.
        """
        own = self._block(self.name, config)
        if self._source(own, own) == 0:
            return [(self.name, self.layer, config)]
        refusal = self._source(own)
        if not isinstance(refusal, FieldError):
            return []
        for name in self.builder.layers:
            other = self.builder.layers[name]
            alike = None if other is self.layer else self._alike(other, own.config)
            if alike is not None and self._source(self._block(name, alike), own) == 0:
                return [(name, other, alike)]
        raise UnderivableError(
            refusal.field, f"{refusal.message} (no installed layer of the same fields will do)"
        )

    def runs_alone(self, config: Any) -> bool:
        """Whether `forward` needs nothing but activations.

        A layer that looks at the model's embedding fails without one; any other fault fails both
        ways, and the suite says what it is.
        """
        try:
            self.layer(self.d_model, config)(torch.zeros(1, 2, self.d_model), PLAIN)
        except Exception:
            return False
        return True

    def _block(self, name: str, config: Any) -> Block:
        return Block(layer=name, config=configs.to_dict(config))

    def _source(self, *blocks: Block) -> Any:
        """What `source` returns or raises; whether it may is for the check that is there for it."""
        try:
            return self.layer.source(self.d_model, blocks)
        except Exception as error:
            return error

    def _alike(self, other: type[Layer], values: dict[str, Any]) -> Any:
        declared = configs.fields_of(other.Config)
        shared = {name: value for name, value in values.items() if name in declared}
        try:
            config: Any = configs.from_dict(other.Config, shared)
            other.check(self.d_model, config)
        except WorkbenchError:
            return None
        return config
